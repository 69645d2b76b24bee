"""Counterparts of the thesis' five data sets (SPEC section 1)."""

import collections
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steel_ad.data import defects, folders, plates
from steel_ad.making import batches, writing
from steel_ad.making.settings import Thesis
from steel_ad.making.writing import Batch, Plan

# Real rolls come round in some thousand pixels, but a picture compiles for a minute where it is 13,000 px long.
PERIOD_PX = 800.0
MARKS = 4  # of a periodic defect on one strip

_TEST_FRACTION = 0.3
_SPECIAL = {"teardrop1": "periodic", "teardrop4": "watermark"}  # what half of a line's defective images show


def run(config: Thesis, *, defects_from: str, out: Path) -> dict[str, Any]:
    """Writes `OUT/<line>` for each line, in the MVTec AD layout, 256x256 px.

    Half of the test images are defective, with defects inserted as `inserted.run` does; in teardrop1 half of those instead
    show marks that a roll repeats along a strip, the plates below them cut from it edge to edge (kind "periodic"); in teardrop4
    half of them show watermarks on the lens. All lines share one split of the defects' sources, so that none that trains
    on one line tests another. Each folder has `settings.json`, `split.json` and `manifest.csv` as that of `inserted.run`.

    Also writes `OUT/figures/insertion.png` (the thesis' figures 2-3 and 2-4) and `OUT/figures/datasets.png` (3-1).

    Args:
      config: the settings.
      defects_from: as in `inserted.run`.
      out: a new folder, or one to go on with or to add lines to.

    Returns:
      Numbers of files in all (`files`), of those `written` now; `skipped` as in `inserted.run`.

    Raises:
      InputError: as `inserted.run`.
    """
    batches.check_lines(config.lines)
    library, record = batches.test_side(defects_from, _TEST_FRACTION, config.seed)
    plans = []
    for line in config.lines:
        settings = {
            "command": "thesis",
            "line": line,
            "num_train": config.num_train,
            "num_test": config.num_test,
            "defects": batches.digest(library.sha256),
            "seed": config.seed,
        }
        writing.check(out / line, settings)
        records = {"settings.json": settings, "split.json": record}
        plans.append(Plan(out=out / line, records=records, batches=_line(config, line, library)))
    written = writing.complete(plans)
    _figures(out / "figures", plans, library)
    return {"files": sum(len(plan.rows) for plan in plans), "written": written, "skipped": record["skipped"]}


def _line(config: Thesis, line: str, library: defects.Library) -> list[Batch]:
    """The images of one line's set."""
    seed, half = config.seed, config.num_test // 2
    counter: collections.Counter[str] = collections.Counter()
    order = batches.in_turn(library, seed, line)
    special = []
    if _SPECIAL.get(line) == "periodic":
        special = _periodic(line, seed, half // 2, library, order, counter)
    elif line in _SPECIAL:
        special = _watermarks(line, seed, half // 2, counter)
    bad = batches.rendered(line, seed, "defective", half - counter.total())
    return [
        *batches.good("train/good", batches.rendered(line, seed, "train", config.num_train)),
        *batches.good("test/good", batches.rendered(line, seed, "good", half)),
        *special,
        *batches.inserted(bad, library, order, counter, batches.stream(seed, line, "insert")),
    ]


def _periodic(
    line: str,
    seed: int,
    num: int,
    library: defects.Library,
    order: Iterator[int],
    counter: collections.Counter[str],
) -> list[Batch]:
    """Strips with one defect each that comes again with every turn of the roll; of each mark the patch that shows most."""
    size, window = batches.SIZE_PX, batches.LIBRARY_SIZE_PX
    # Long enough for all marks, wherever the first one is and whatever the others' jitter.
    patches = math.ceil((PERIOD_PX * 1.01 * MARKS + window) / size)

    def draw(strip: int, index: int, marks: int) -> list[np.ndarray]:
        key = jax.random.fold_in(batches.stream(seed, line, "strip"), strip)
        plate = plates.render(key, line, shape=(patches * size, size))[0]
        image, mask, corners = map(
            np.asarray,
            defects.insert_periodic(
                jax.random.fold_in(key, 1), plate, batches.one(library, index), period_px=PERIOD_PX
            ),
        )
        labelled = mask.sum(axis=1)
        made = []
        for top in corners[:marks, 0]:
            of_mark = np.zeros_like(labelled)
            of_mark[top : top + window] = labelled[top : top + window]
            start = int(of_mark.reshape(patches, size).sum(axis=1).argmax()) * size
            made += batches.pair(image[start : start + size], mask[start : start + size])
        return made

    made = []
    for strip, ((start, stop), index) in enumerate(zip(batches.spans(num, MARKS), order, strict=False)):
        rows, source = [], library.sources[library.source[index]]
        for mark in range(stop - start):
            plate = f"procedural/{line}/strip/{strip:04d}/mark/{mark}"
            rows += batches.defective("periodic", counter, plate, source, index)
        made.append(Batch(rows, functools.partial(draw, strip, index, stop - start)))
    return made


def _watermarks(line: str, seed: int, num: int, counter: collections.Counter[str]) -> list[Batch]:
    def draw(start: int, stop: int) -> list[np.ndarray]:
        key = jax.random.fold_in(batches.stream(seed, line, "watermark"), start)
        images, masks = plates.render_defective(key, line, "watermark", batches.SIZE_PX, num=batches.BATCH)
        return [part for i in range(stop - start) for part in batches.pair(images[i], masks[i])]

    made = []
    for start, stop in batches.spans(num, batches.BATCH):
        rows = []
        for i in range(start, stop):
            rows += batches.defective("watermark", counter, f"procedural/{line}/watermark/{i:04d}", "watermark")
        made.append(Batch(rows, functools.partial(draw, start, stop)))
    return made


def _figures(folder: Path, plans: list[Plan], library: defects.Library) -> None:
    """Draws one defective plate of each line, and one defect as it was cut out and inserted."""
    from steel_ad.report import making as figures

    overview, insertion = [], []
    for number, plan in enumerate(plans):
        name = plan.out.name
        tested = [row for row in plan.rows if row["file"].startswith("test/") and row["defect"]]
        image, mask = _pair(plan.out, tested[0 if name in _SPECIAL else number % len(tested)])
        good = folders.read_image(plan.out / "test" / "good" / "0000.png")
        overview.append(figures.Dataset(name=name, good=good, defective=image, truth=mask))
        inserted = [row for row in tested if row["defect_index"] != ""]
        row = inserted[number % len(inserted)]
        image, mask = _pair(plan.out, row)
        insertion.append(
            figures.Insertion(
                name=f"{name}\n{Path(row['file']).parent.name}",
                defect=np.asarray(library.cutout[row["defect_index"]]),
                label=np.asarray(library.mask[row["defect_index"]]),
                plate=image,
                truth=mask,
            )
        )
    figures.insertion(folder / "insertion.png", insertion, title="artificial defects, cut out and inserted")
    figures.dataset_overview(folder / "datasets.png", overview, title="defect-free and defective plates")


def _pair(folder: Path, row: writing.Row) -> tuple[np.ndarray, np.ndarray]:
    image = folders.read_image(folder / row["file"])
    return image, folders.read_mask(folder / batches.mask_path(Path(row["file"])), image.shape)
