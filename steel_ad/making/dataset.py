"""Makes data sets: patches cut from a video, fixed test sets with inserted defects, the thesis' five sets (SPEC section 1).

All of them can be interrupted at any moment and gone on with: what a file is made of follows from its name and the
settings alone, files are written whole or not at all, and what is there is not written again. `settings.json` keeps the
settings, `manifest.csv`, written last, the SHA-256 of every file.
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import datasets, defects, folders, plates, video
from steel_ad.errors import InputError
from steel_ad.progress import progress

SIZE_PX = 256  # of the thesis' and of procedural plates
LIBRARY_SIZE_PX = 208
TEST_FRACTION = 0.3
PROCEDURAL_TRAIN = 300
PROCEDURAL_DEFECTS = 240
# Real rolls come round in some thousand pixels, but a picture compiles for a minute where it is 13,000 px long.
PERIOD_PX = 800.0
MARKS = 4  # of a periodic defect on one strip
POSITIONS = ("grid", "random")

_BATCH = 32
_SPECIAL = {"teardrop1": "periodic", "teardrop4": "watermark"}  # what half of a line's defective images show
_Row = dict[str, Any]


def from_video(
    path: Path,
    out: Path,
    *,
    size: int = 256,
    positions: str = "grid",
    per_frame: int | None = None,
    seed: int | None = None,
    min_contrast: float = 4.0,
    min_sharpness: float = 0.6,
) -> dict[str, Any]:
    """Cuts a line-scan video's frames into grey patches, uint8 PNG, `OUT/<frame>_<top>_<left>.png`.

    A blank frame has less contrast (`video.measure`) than `min_contrast`, an absolute number of grey levels; camera noise
    alone has 2 to 3. A blurred frame has less sharpness than `min_sharpness` times the median of the frames that are not
    blank: sharpness depends on pattern and light, so this threshold is relative. Neither is cut; 0 lets all frames pass.

    Writes `frames.csv` (what was measured, and the verdict), `manifest.csv` (file, source, frame, top, left, sha256).

    Args:
      path: the video.
      out: a new folder, or one to go on with.
      size: height and width of a patch, px.
      positions: "grid" is edge to edge from the top left corner, what is left at the other edges is not used; "random" is
        `per_frame` different places a frame, uniform over all of them.
      per_frame: patches a frame, 4 by default; with "random" only.
      seed: of the places, 0 by default; with "random" only.
      min_contrast: grey levels, standard deviation.
      min_sharpness: relative.

    Returns:
      Numbers of `frames` read, `blank` and `blurred` ones, `patches` in all and those `written` now; `warning`: a sentence
      about frames that could not be read, or None.

    Raises:
      InputError: an option out of its range, a video that cannot be used or is smaller than a patch, no frame that passes,
        `out` of other settings, or, with status 1, a video of which nothing can be read or a full disk.
    """
    if positions not in POSITIONS:
        raise InputError(f"--positions={positions} must be one of {', '.join(POSITIONS)}")
    if positions == "grid" and (per_frame is not None or seed is not None):
        raise InputError("--per_frame and --seed are for --positions=random: leave them out")
    per_frame, seed = 4 if per_frame is None else per_frame, seed or 0
    _least(1, size=size, per_frame=per_frame)
    _least(0, min_contrast=min_contrast, min_sharpness=min_sharpness)
    _check_seed(seed)
    with contextlib.closing(video.frames(path)) as frames:
        _check_room(path, next(frames).shape, size, per_frame if positions == "random" else 1)
    settings = {
        "command": "from_video",
        "video_sha256": folders.fingerprint(path),
        "size": size,
        "positions": positions,
        "min_contrast": min_contrast,
        "min_sharpness": min_sharpness,
    }
    if positions == "random":
        settings |= {"per_frame": per_frame, "seed": seed}
    _check(out, settings)
    rows = _survey(path, out / "frames.csv", min_contrast, min_sharpness)
    verdicts = collections.Counter(row["verdict"] for row in rows)
    found = {"frames": len(rows), "blank": verdicts["blank"], "blurred": verdicts["blurred"]}
    if not verdicts["good"]:
        raise InputError(
            f"{path} has no frame to cut: of {len(rows)}, {found['blank']} are blank and {found['blurred']} blurred: "
            "use a lower --min_contrast or --min_sharpness"
        )
    files.write_json(out / "settings.json", settings)
    files.write_csv(out / "frames.csv", rows)

    plan: dict[int, list[_Row]] = {}
    for row in rows:
        if row["verdict"] == "good":
            shape, frame = (int(row["height"]), int(row["width"])), int(row["frame"])
            _check_room(path, shape, size, per_frame if positions == "random" else 1)
            plan[frame] = [
                {
                    "file": f"{frame:06d}_{top:05d}_{left:05d}.png",
                    "source": path.name,
                    "frame": frame,
                    "top": top,
                    "left": left,
                }
                for top, left in _corners(shape, size, positions, per_frame, [seed, frame])
            ]
    patches = [row for of_frame in plan.values() for row in of_frame]
    done = sum((out / row["file"]).exists() for row in patches)
    pending = {frame for frame, of_frame in plan.items() if not all((out / row["file"]).exists() for row in of_frame)}
    written = 0
    with (
        progress("cut", len(patches), "patches", done=done) as update,
        contextlib.closing(video.frames(path)) as frames,
    ):
        for index in range(max(pending, default=-1) + 1):
            image = next(frames, None)
            if image is None or (index in pending and image.shape != (rows[index]["height"], rows[index]["width"])):
                raise InputError(f"{out / 'frames.csv'} is not of {path}: delete it and run again")
            if index in pending:
                cut = [image[r["top"] : r["top"] + size, r["left"] : r["left"] + size] for r in plan[index]]
                written += _write(out, plan[index], cut)
                update(done + written)
    _finish(out, patches)
    warning = video.missing(path, read=len(rows), promised=video.length(path))
    return {**found, "patches": len(patches), "written": written, "warning": warning}


def insert(
    data: str,
    defects_: str,
    out: Path,
    *,
    num_test: int = 100,
    test_fraction: float = TEST_FRACTION,
    blend: str = "difference",
    augment: str = "thesis",
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a fixed set in the MVTec AD layout: good plates, and others with defects inserted, with their masks.

    The defects of the test images come from source images that `defects.split` keeps for testing; `split.json` names the
    sources of both sides by SHA-256, so that training can leave the test's out. Kinds take turns, and so do the defects of
    a kind. Test plates are the source's good test images, as far as there are enough, and else held out from its good
    training images; none of equal content is in train/good.

    Writes `train/good`, `test/good`, `test/<kind>`, `ground_truth/<kind>/*_mask.png`, `split.json` and `manifest.csv` (file,
    plate, defect: the source image, defect_index: in the test library, sha256).

    Args:
      data: as `datasets.load`; procedural/LINE gives 300 plates to train and as many as it takes to test.
      defects_: folder of labelled defects on plain steel (`defects.load`), or "procedural" for 240 drawn ones.
      out: a new folder, or one to go on with.
      num_test: good test images, and as many defective ones.
      test_fraction: of each kind's source images.
      blend: one of `defects.BLENDS`.
      augment: one of `defects.AUGMENTS`.
      seed: of everything drawn.

    Returns:
      Numbers of files in all (`files`), of those `written` now, of test images by kind (`kinds`), and `skipped`: a sentence
      for each defect that cannot be used.

    Raises:
      InputError: an option out of its range, data or defects that cannot be used, too few plates, a source on both sides,
        `out` of other settings, or, with status 1, a full disk.
    """
    _least(1, num_test=num_test)
    _check_seed(seed)
    for name, value, choices in (("blend", blend, defects.BLENDS), ("augment", augment, defects.AUGMENTS)):
        if value not in choices:
            raise InputError(f"--{name}={value} must be one of {', '.join(choices)}")
    if not 0 < test_fraction < 1:
        raise InputError(f"--test_fraction={test_fraction} must lie between 0 and 1")
    if data.startswith("procedural/") and not Path(data).is_dir():
        line = data.removeprefix("procedural/")
        _check_lines([line])
        train = _rendered(line, seed, "train", PROCEDURAL_TRAIN)
        good, bad = (_rendered(line, seed, stream, num_test) for stream in ("good", "defective"))
        source, smallest = data, (SIZE_PX, SIZE_PX)
    else:
        dataset = datasets.load(data)
        kept, held = _hold_out(data, dataset, 2 * num_test, seed)
        train, good, bad = _loaded(kept), _loaded(held[:num_test]), _loaded(held[num_test:])
        source = _digest(row["sha256"] for row in dataset.manifest)
        shapes = [image.shape for _, image in held]
        smallest = (min(h for h, _ in shapes), min(w for _, w in shapes))
    library, record = _test_defects(defects_, test_fraction, seed)
    library, too_large = defects.fitting(library, smallest)
    record["skipped"] += too_large
    settings = {
        "command": "insert",
        "data": source,
        "defects": _digest(library.sha256),
        "num_test": num_test,
        "test_fraction": test_fraction,
        "blend": blend,
        "augment": augment,
        "seed": seed,
    }
    counter: collections.Counter[str] = collections.Counter()
    batches = [
        *_good("train/good", train),
        *_good("test/good", good),
        *_inserted(bad, library, _in_turn(library, seed), counter, _key(seed, "insert"), blend=blend, augment=augment),
    ]
    _check(out, settings)
    written = _complete([(out, settings, record, batches)])
    return {
        "files": sum(len(batch.rows) for batch in batches),
        "written": written,
        "kinds": {"good": num_test, **counter},
        "skipped": record["skipped"],
    }


def thesis(
    out: Path,
    *,
    lines: Sequence[str] = tuple(plates.LINES),
    num_train: int = 2000,
    num_test: int = 200,
    defects_: str = "procedural",
    seed: int = 0,
) -> dict[str, Any]:
    """Writes counterparts of the thesis' five data sets, `OUT/<line>` each, in the MVTec AD layout, 256x256 px.

    Half of the test images are defective, with defects inserted as `insert` does; in teardrop1 half of those instead show
    marks that a roll repeats along a strip, the plates below them cut from it edge to edge (kind "periodic"); in teardrop4
    half of them show watermarks on the lens. All lines share one split of the defects' sources, so that none that trains
    on one line tests another. Each folder has `settings.json`, `split.json` and `manifest.csv` as in `insert`.

    Also writes `OUT/figures/insertion.png` (the thesis' figures 2-3 and 2-4) and `OUT/figures/datasets.png` (3-1).

    Args:
      out: a new folder, or one to go on with or to add lines to.
      lines: names in `plates.LINES`.
      num_train: good training images of each.
      num_test: test images of each, a multiple of 4.
      defects_: as in `insert`.
      seed: of everything drawn.

    Returns:
      Numbers of files in all (`files`), of those `written` now; `skipped` as in `insert`.

    Raises:
      InputError: as `insert`.
    """
    from steel_ad.report import figures

    _check_lines(lines)
    _least(1, num_train=num_train)
    _check_seed(seed)
    if num_test < 4 or num_test % 4:
        raise InputError(f"--num_test={num_test} must be a multiple of 4: half are good, a quarter of a special kind")
    library, record = _test_defects(defects_, TEST_FRACTION, seed)
    sets = []
    for line in lines:
        settings = {
            "command": "thesis",
            "line": line,
            "num_train": num_train,
            "num_test": num_test,
            "defects": _digest(library.sha256),
            "seed": seed,
        }
        _check(out / line, settings)
        batches = _thesis_set(line, num_train, num_test, library, seed)
        sets.append((out / line, settings, record, batches))
    written = _complete(sets)

    overview, insertion = [], []
    for number, (folder, _, _, batches) in enumerate(sets):
        tested = [row for b in batches for row in b.rows if row["file"].startswith("test/") and row["defect"]]
        shown = tested[0 if folder.name in _SPECIAL else number % len(tested)]
        image, mask = _read_pair(folder, shown)
        good = folders.read_image(folder / "test" / "good" / "0000.png")
        overview.append(figures.Dataset(name=folder.name, good=good, defective=image, truth=mask))
        drawn = [row for row in tested if row["defect_index"] != ""]
        row = drawn[number % len(drawn)]
        image, mask = _read_pair(folder, row)
        insertion.append(
            figures.Insertion(
                name=f"{folder.name}\n{Path(row['file']).parent.name}",
                defect=np.asarray(library.cutout[row["defect_index"]]),
                label=np.asarray(library.mask[row["defect_index"]]),
                plate=image,
                truth=mask,
            )
        )
    figures.insertion(out / "figures" / "insertion.png", insertion, title="artificial defects, cut out and inserted")
    figures.dataset_overview(out / "figures" / "datasets.png", overview, title="defect-free and defective plates")
    return {"files": sum(len(b.rows) for s in sets for b in s[3]), "written": written, "skipped": record["skipped"]}


@dataclasses.dataclass(frozen=True)
class _Plates:
    """Good plates that are made together: their names, and what makes them, uint8 [h, w] each."""

    names: list[str]
    draw: Callable[[], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Files that are made together: their rows of the manifest, and what makes them, uint8 [h, w] each."""

    rows: list[_Row]
    draw: Callable[[], list[np.ndarray]]


def _least(least: int, **options: float) -> None:
    for name, value in options.items():
        if not value >= least or value == math.inf:
            raise InputError(f"--{name}={value} must be a number of at least {least}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed={seed} must be at least 0 and below {2**32}")


def _check_lines(lines: Sequence[str]) -> None:
    for line in lines or [""]:
        if line not in plates.LINES:
            raise InputError(f"there is no line {line!r}: use {', '.join(plates.LINES)}")
    if len(set(lines)) < len(lines):
        raise InputError("--lines names a line twice: name each once")


def _check_room(path: Path, shape: tuple[int, ...], size: int, count: int) -> None:
    height, width = shape
    if min(shape) < size:
        raise InputError(
            f"{path} has frames of {width}x{height} pixels, smaller than the patch of {size}: use a smaller --size"
        )
    if count > (height - size + 1) * (width - size + 1):
        raise InputError(f"{path} has frames of {width}x{height} pixels, too small for --per_frame={count}: use less")


def _survey(path: Path, kept: Path, min_contrast: float, min_sharpness: float) -> list[_Row]:
    """What each frame measures, and whether it is "good", "blank" or "blurred"; as `kept` has it, where it is there."""
    if kept.exists():
        with files.understood(kept, "delete it and run again"), kept.open(newline="", encoding="utf-8") as file:
            found: list[_Row] = [
                {
                    **{k: int(row[k]) for k in ("frame", "height", "width")},
                    **{k: float(row[k]) for k in ("contrast", "sharpness")},
                    "verdict": row["verdict"],
                }
                for row in csv.DictReader(file)
            ]
            if [row["frame"] for row in found] != list(range(len(found))):
                raise ValueError("its frames do not follow each other")
            if any(min(row["height"], row["width"]) < 1 for row in found):
                raise ValueError("a frame has no pixels")
            if any(row["height"] * row["width"] > video.MAX_PIXELS for row in found):
                raise ValueError("a frame is larger than any is read")
            return found
    rows: list[_Row] = []
    promised = video.length(path)
    with progress("survey", promised, "frames") as update, contextlib.suppress(video.CutShort):
        for frame in video.frames(path):
            contrast, sharpness = video.measure(frame)
            rows.append(
                {
                    "frame": len(rows),
                    "height": frame.shape[0],
                    "width": frame.shape[1],
                    "contrast": contrast,
                    "sharpness": sharpness,
                }
            )
            if len(rows) <= promised:
                update(len(rows))
    blank = np.array([row["contrast"] < min_contrast for row in rows])
    sharp = np.array([row["sharpness"] for row in rows])
    usual = float(np.median(sharp[~blank])) if not blank.all() else 0.0
    verdicts = np.where(blank, "blank", np.where(sharp < min_sharpness * usual, "blurred", "good"))
    return [{**row, "verdict": verdict} for row, verdict in zip(rows, verdicts.tolist(), strict=True)]


def _corners(shape: tuple[int, int], size: int, positions: str, count: int, seed: list[int]) -> list[tuple[int, int]]:
    height, width = (side - size + 1 for side in shape)
    if positions == "grid":
        return list(itertools.product(range(0, height, size), range(0, width, size)))
    places = np.random.default_rng(seed).choice(height * width, count, replace=False)
    return [divmod(int(place), width) for place in np.sort(places)]


def _key(seed: int, *names: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32("/".join(names).encode()))


def _digest(hashes: Iterator[str] | Sequence[str]) -> str:
    """The same for the same contents, whatever the files' names and order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def _test_defects(source: str, fraction: float, seed: int) -> tuple[defects.Library, dict[str, Any]]:
    """The test side of the defects, as numpy arrays, and the record of the split, with what was skipped."""
    if source == "procedural":
        library = defects.procedural(jax.random.key(seed), PROCEDURAL_DEFECTS, size=LIBRARY_SIZE_PX)
        skipped: list[str] = []
    else:
        library, skipped = defects.load(source, size=LIBRARY_SIZE_PX)
    if "good" in library.kinds:
        raise InputError(f"{source} has a kind of defect called 'good': rename its folder")
    train, test = defects.split(library, fraction, seed)
    record = {**defects.split_record(train, test, fraction, seed), "skipped": skipped}
    return jax.tree.map(np.asarray, test), record


def _rendered(line: str, seed: int, stream: str, num: int) -> list[_Plates]:
    def draw(start: int, stop: int) -> list[np.ndarray]:
        key = jax.random.fold_in(_key(seed, line, stream), start)
        # Always as many: another number would be compiled anew.
        images = plates.render(key, line, SIZE_PX, num=_BATCH)
        return list(np.asarray(plates.to_uint8(images))[: stop - start])

    return [
        _Plates(
            [f"procedural/{line}/{stream}/{i:04d}" for i in range(start, stop)], functools.partial(draw, start, stop)
        )
        for start, stop in _spans(num, _BATCH)
    ]


def _spans(num: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, num)) for start in range(0, num, size)]


def _loaded(named: Sequence[tuple[str, np.ndarray]]) -> list[_Plates]:
    def draw(start: int, stop: int) -> list[np.ndarray]:
        return [image for _, image in named[start:stop]]

    return [
        _Plates([name for name, _ in named[start:stop]], functools.partial(draw, start, stop))
        for start, stop in _spans(len(named), _BATCH)
    ]


def _hold_out(data: str, dataset: datasets.Dataset, count: int, seed: int) -> tuple[list, list]:
    """(name, image) of the plates to train on and of `count` to test on, no content in both."""

    def unique(named):
        return {
            hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest(): (name, image)
            for name, image in named
        }

    test = unique((f"test/{t.name}", t.image) for t in dataset.test if not t.defective)
    train = unique(zip((row["path"] for row in dataset.manifest), dataset.train, strict=True))
    rng = np.random.default_rng([seed, 0x7E57])
    pool = [list(group)[i] for group in (test, train) for i in rng.permutation(len(group))]
    held = list(dict.fromkeys(pool))[:count]
    held = [
        held[i] for i in rng.permutation(len(held))
    ]  # or good and defective ones would differ in where they are from
    left = [named for content, named in train.items() if content not in set(held)]
    if len(held) < count or 2 * len(left) < len(train):
        raise InputError(
            f"{data} has {len(train)} different good images to train on and {len(test)} to test on, too few for "
            f"--num_test={count // 2}, which takes {count} and leaves half of the former: use a smaller --num_test"
        )
    return left, [(test.get(content) or train[content]) for content in held]


def _row(file: str, plate: str, defect: str = "", index: int | str = "") -> _Row:
    return {"file": file, "plate": plate, "defect": defect, "defect_index": index}


def _rows(kind: str, counter: collections.Counter, plate: str, defect: str, index: int | str = "") -> list[_Row]:
    """The next image of a kind, after its mask: there is never an image without one."""
    name = f"{counter[kind]:04d}"
    counter[kind] += 1
    return [
        _row(f"ground_truth/{kind}/{name}_mask.png", plate, defect, index),
        _row(f"test/{kind}/{name}.png", plate, defect, index),
    ]


def _good(folder: str, plates_: list[_Plates]) -> list[_Batch]:
    number = itertools.count()
    return [_Batch([_row(f"{folder}/{next(number):04d}.png", name) for name in p.names], p.draw) for p in plates_]


def _in_turn(library: defects.Library, seed: int, line: str = "") -> Iterator[int]:
    """Indices of defects for ever: the kinds in turn, and the defects of a kind in a random order."""
    rng = np.random.default_rng([seed, 0xDEF, zlib.crc32(line.encode())])
    of_kind = [np.flatnonzero(library.kind == k) for k in range(len(library.kinds))]
    yield from itertools.chain.from_iterable(
        zip(*(itertools.cycle(rng.permutation(group).tolist()) for group in of_kind if group.size), strict=True)
    )


def _one(library: defects.Library, index: int) -> defects.Library:
    return jax.tree.map(lambda array: array[index : index + 1], library)


def _pair(image: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> list[np.ndarray]:
    return [np.asarray(mask).astype(np.uint8) * 255, np.asarray(plates.to_uint8(image))]


def _read_pair(folder: Path, row: _Row) -> tuple[np.ndarray, np.ndarray]:
    image = folders.read_image(folder / row["file"])
    file = Path(row["file"])
    return image, folders.read_mask(folder / "ground_truth" / file.parent.name / f"{file.stem}_mask.png", image.shape)


def _inserted(
    plates_: list[_Plates],
    library: defects.Library,
    order: Iterator[int],
    counter: collections.Counter,
    key: jax.Array,
    *,
    blend: str = "difference",
    augment: str = "thesis",
) -> list[_Batch]:
    def draw(group: _Plates, chosen: list[int], start: int) -> list[np.ndarray]:
        made = []
        for i, (image, index) in enumerate(zip(group.draw(), chosen, strict=True), start):
            plate = jnp.asarray(image, jnp.float32)[None] / 255
            key_i = jax.random.fold_in(key, i)
            images, masks, _ = defects.insert(key_i, plate, _one(library, index), blend=blend, augment=augment)
            made += _pair(images[0], masks[0])
        return made

    batches, start = [], 0
    for group in plates_:
        chosen = list(itertools.islice(order, len(group.names)))
        rows = [
            row
            for name, i in zip(group.names, chosen, strict=True)
            for row in _rows(library.kinds[library.kind[i]], counter, name, library.sources[library.source[i]], i)
        ]
        batches.append(_Batch(rows, functools.partial(draw, group, chosen, start)))
        start += len(chosen)
    return batches


def _periodic(
    line: str,
    seed: int,
    num: int,
    library: defects.Library,
    order: Iterator[int],
    counter: collections.Counter,
) -> list[_Batch]:
    """Strips with one defect each that comes again with every turn of the roll; of each mark the patch that shows most."""
    # Long enough for all marks, wherever the first one is and whatever the others' jitter.
    rows = math.ceil((PERIOD_PX * 1.01 * MARKS + LIBRARY_SIZE_PX) / SIZE_PX)

    def draw(strip: int, index: int, marks: int) -> list[np.ndarray]:
        key = jax.random.fold_in(_key(seed, line, "strip"), strip)
        plate = plates.render(key, line, shape=(rows * SIZE_PX, SIZE_PX))[0]
        image, mask, corners, _ = defects.insert_periodic(
            jax.random.fold_in(key, 1), plate, _one(library, index), period_px=PERIOD_PX
        )
        labelled = np.asarray(mask).sum(axis=1)
        made = []
        for top in np.asarray(corners)[:marks, 0]:
            of_mark = np.zeros_like(labelled)
            of_mark[top : top + LIBRARY_SIZE_PX] = labelled[top : top + LIBRARY_SIZE_PX]
            start = int(of_mark.reshape(rows, SIZE_PX).sum(axis=1).argmax()) * SIZE_PX
            made += _pair(np.asarray(image)[start : start + SIZE_PX], np.asarray(mask)[start : start + SIZE_PX])
        return made

    batches = []
    for strip, ((start, stop), index) in enumerate(zip(_spans(num, MARKS), order, strict=False)):
        rows_of_strip = [
            row
            for mark in range(stop - start)
            for row in _rows(
                "periodic",
                counter,
                f"procedural/{line}/strip/{strip:04d}/mark/{mark}",
                library.sources[library.source[index]],
                index,
            )
        ]
        batches.append(_Batch(rows_of_strip, functools.partial(draw, strip, index, stop - start)))
    return batches


def _watermarks(line: str, seed: int, num: int, counter: collections.Counter) -> list[_Batch]:
    def draw(start: int, stop: int) -> list[np.ndarray]:
        key = jax.random.fold_in(_key(seed, line, "watermark"), start)
        images, masks = plates.render_defective(key, line, "watermark", SIZE_PX, num=_BATCH)
        return [part for i in range(stop - start) for part in _pair(images[i], masks[i])]

    return [
        _Batch(
            [
                row
                for i in range(start, stop)
                for row in _rows("watermark", counter, f"procedural/{line}/watermark/{i:04d}", "watermark")
            ],
            functools.partial(draw, start, stop),
        )
        for start, stop in _spans(num, _BATCH)
    ]


def _thesis_set(line: str, num_train: int, num_test: int, library: defects.Library, seed: int) -> list[_Batch]:
    counter: collections.Counter[str] = collections.Counter()
    order, half = _in_turn(library, seed, line), num_test // 2
    special = {
        "periodic": lambda: _periodic(line, seed, half // 2, library, order, counter),
        "watermark": lambda: _watermarks(line, seed, half // 2, counter),
    }
    batches = special[_SPECIAL[line]]() if line in _SPECIAL else []
    bad = _rendered(line, seed, "defective", half - counter.total())
    return [
        *_good("train/good", _rendered(line, seed, "train", num_train)),
        *_good("test/good", _rendered(line, seed, "good", half)),
        *batches,
        *_inserted(bad, library, order, counter, _key(seed, line, "insert")),
    ]


def _check(out: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder that holds something else; clears away what a killed run had not finished writing."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder: use another --out")
    if (out / "settings.json").exists():
        if other := configs.difference(settings, files.read_json(out / "settings.json", dict)):
            raise InputError(f"{out} holds a set made with other settings, which differs in {other}: use a new --out")
        for left in out.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"{out} holds other files: use a new --out")


def _complete(sets: list[tuple[Path, dict, dict, list[_Batch]]]) -> int:
    """Writes what is missing of sets (folder, settings, split, batches); the number of files written."""
    every = [out / row["file"] for out, _, _, batches in sets for batch in batches for row in batch.rows]
    done, written = sum(path.exists() for path in every), 0
    with progress("write", len(every), "files", done=done) as update:
        for out, settings, record, batches in sets:
            files.write_json(out / "settings.json", settings)
            files.write_json(out / "split.json", record)
            for batch in batches:
                if not all((out / row["file"]).exists() for row in batch.rows):
                    written += _write(out, batch.rows, batch.draw())
                    update(done + written)
            _finish(out, [row for batch in batches for row in batch.rows])
    return written


def _write(out: Path, rows: list[_Row], images: list[np.ndarray]) -> int:
    """Writes those images whose files are missing; their number."""
    written = 0
    for row, image in zip(rows, images, strict=True):
        path = out / row["file"]
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{path.parent} cannot be made ({error.strerror}): use another --out", status=1
                ) from error
            folders.write_image(path, image)
            written += 1
    return written


def _finish(out: Path, rows: list[_Row]) -> None:
    """Writes the manifest, or checks the files against the one that is there."""
    path = out / "manifest.csv"
    rows = [{**row, "sha256": folders.fingerprint(out / row["file"])} for row in rows]
    if path.exists():
        with files.understood(path, "delete it and run again"), path.open(newline="", encoding="utf-8") as file:
            before = {row["file"]: row["sha256"] for row in csv.DictReader(file)}
        for row in rows:
            if before.get(row["file"]) != row["sha256"]:
                raise InputError(f"{out / row['file']} is not what manifest.csv says: delete it and run again")
    else:
        files.write_csv(path, rows)
