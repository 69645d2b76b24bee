"""The inspection: strips and images through a trained detector to a list of defects and a report."""

import base64
import dataclasses
import hashlib
import heapq
import json
import os
import queue
import re
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.data import folders, video
from steel_ad.errors import InputError
from steel_ad.inspection import calibration, drift, ledger, recurrence, tiles
from steel_ad.inspection.ledger import Camera
from steel_ad.inspection.tiles import Band
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.ops.morphology import grey_opening
from steel_ad.progress import Update, progress
from steel_ad.studies import files, runs, trained
from steel_ad.studies.trained import Trained

_VIDEOS = (".avi", ".mp4", ".mov", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".y4m")
_BATCH = 4
_WORST = 24
_CLOSE_UP_PX = 96
_LISTED = 2000
# Two defects of a roll are no further apart across.
_PLACE_MM, _PLACE_PX = 10.0, 40.0


@dataclasses.dataclass(frozen=True)
class Strip:
    """What one camera saw without a gap: `paths` are images that follow each other, or one video."""

    camera: Camera
    image: str
    paths: tuple[Path, ...]

    @property
    def single(self) -> bool:
        """Whether it is a plate of its own."""
        return bool(self.image)

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 `[h_i, w]` along the strip.

        Raises:
          InputError: a file that cannot be read, or frames of different widths.
        """
        width = None
        for path in self.paths:
            for frame in video.frames(path) if _is_video(path) else (folders.read_image(path),):
                if width not in (None, frame.shape[1]):
                    raise InputError(
                        f"{path} is {frame.shape[1]} pixels wide, but the strip before it {width}: leave it out"
                    )
                width = frame.shape[1]
                yield frame


def run(config: configs.Inspection, *, model: Path, source: str, calibrate_on: str, out: Path) -> dict[str, Any]:
    """Inspects, and writes `ledger.csv`, `ledger.jsonl`, `coil_map.png`, `scores.png`, `close_ups/`, `report.html`,
    `summary.json`.

    The same call again goes on after an interruption; a finished inspection is only read.

    Args:
      model: the workdir of a training run.
      source: an image, a video (one endless strip), a folder of images, or a JSON file of cameras: a list of objects with
        `name`, `source` (relative to the file), and optionally `side`, `across_mm`, `mm_per_px`.
      calibrate_on: folder of good images; those of one of its subfolders, at any depth, come from one strip. "": no promise,
        the run's own threshold.

    Returns:
      What `summary.json` holds.

    Raises:
      InputError: a model, source or calibration that cannot be used, too few good images, an `out` of other settings.
    """
    detector = trained.load(model, config.map)
    check_tile(config, detector)
    cameras = _cameras(Path(source), config.mm_per_px or None)
    check_out(out, [calibrate_on, *(where for _, where in cameras)])
    strips = [s for camera, where in cameras for s in _strips_of(where, camera, config.strip)]
    _check_flags(config, strips, calibrate_on)
    good = good_images(calibrate_on) if calibrate_on else []
    settings = {
        **dataclasses.asdict(config),
        "model": str(model),
        "model_sha256": detector.sha256,
        "source": source,
        "source_files": _stamp(strips, Path(source)),
        "calibration": calibrate_on,
        "calibration_files": _digest([[os.path.relpath(p, calibrate_on), folders.fingerprint(p)] for p in good]),
        "calibration_strips": bool(good) and _endless(strips),
        "training_finished": detector.finished,
        **({} if good else {"training_threshold": detector.threshold}),
    }
    frames = sum(max(1, video.length(p)) if _is_video(p) else 1 for s in strips for p in s.paths)
    claimed = out / "inspection.json"
    if claimed.exists() and (other := configs.difference(settings, files.read_json(claimed))):
        raise InputError(f"{out} holds another inspection, which differs in {other}: use a new --out")
    if (out / "summary.json").exists():
        return files.read_json(out / "summary.json")
    for s in strips if good else ():
        if s.single:
            _check_size(s.paths[0], folders.image_shape(s.paths[0]), config.tile_px)
    view = View(detector, config)
    limit = _limit(config, detector, view, good, calibrate_on, settings, out)
    # Not before the calibration, so that after a refusal another rate may be asked for in the same place.
    files.write_json(claimed, settings)
    start = time.perf_counter()
    found = _inspect(view, strips, limit, frames, out)
    return _write(config, strips, found, limit, settings, time.perf_counter() - start, out)


def check_tile(config: configs.Inspection, detector: Trained) -> None:
    """Refuses a tile that the detector cannot see.

    Raises:
      InputError: it is smaller than the detector's patch.
    """
    if config.tile_px + 2 * config.halo_px < detector.least_px:
        raise InputError(
            f"--tile_px={config.tile_px} with --halo_px={config.halo_px} on each side is smaller than the detector's patch "
            f"of {detector.least_px}: use larger ones"
        )


def check_out(out: Path, read: Iterable[str | Path]) -> None:
    """Refuses a folder to write in one that is read, whose files would be input the next time.

    Raises:
      InputError: it is one of the folders, or lies in one.
    """
    for folder in filter(None, map(str, read)):
        if os.path.isdir(folder) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"--out={out} lies in {folder}, which is read: write to another folder")


def _check_flags(config: configs.Inspection, strips: Sequence[Strip], calibrate_on: str) -> None:
    """Refuses settings that would have no effect, or one that was not meant."""
    scales = {s.camera.mm_per_px for s in strips}
    if not calibrate_on and (config.confidence is not None or config.false_alarms_per_m2):
        raise InputError(
            "--confidence and --false_alarms_per_m2 are promises from good images: give --calibration=FOLDER"
        )
    if config.false_alarms_per_m2 and scales != {config.mm_per_px}:
        raise InputError(
            f"--false_alarms_per_m2 takes one scale, that of --mm_per_px={config.mm_per_px:g}, but the cameras have others: "
            "inspect them one by one"
        )
    if config.pitch_mm and scales == {None}:
        raise InputError(f"--pitch_mm={config.pitch_mm:g} needs --mm_per_px, the size of a pixel")


def _check_size(path: Path, shape: tuple[int, ...], tile: int) -> None:
    if min(shape) < tile:
        raise InputError(
            f"{path} is {shape[1]}x{shape[0]} pixels, less than a tile of {tile}, for which no promise was made: leave it out or "
            "use a smaller --tile_px"
        )


def good_images(folder: str) -> list[Path]:
    """The calibration images below a folder.

    Raises:
      InputError: there are none, or the folder is a whole data set, with its defective images.
    """
    if (Path(folder) / "ground_truth").exists():
        raise InputError(
            f"{folder} is a data set with defective images: name its folder of good ones, such as test/good"
        )
    return folders.list_images(folder, recursive=True)


def _cameras(path: Path, usual: float | None) -> list[tuple[Camera, Path]]:
    """The cameras and what they saw; `usual` is the scale, mm a pixel, of those that do not give theirs."""
    if path.suffix.lower() != ".json":
        return [(Camera(mm_per_px=usual), path)]
    rows = files.read_json(path)
    try:
        found = []
        for r in rows:
            scale = r.get("mm_per_px", usual)
            camera = Camera(
                str(r["name"]),
                r.get("side", "top"),
                float(r.get("across_mm", 0)),
                None if scale is None else float(scale),
            )
            found.append((camera, path.parent / r["source"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{path} is no list of cameras: give each name, source and optionally side, across_mm, mm_per_px"
        ) from None
    if not found or len({camera.name for camera, _ in found}) < len(found):
        raise InputError(f"{path} must list at least one camera, each with a name of its own")
    return found


def _strips_of(path: Path, camera: Camera, one: bool) -> list[Strip]:
    if path.is_dir():
        images = folders.list_images(path)
        if not one:
            return [Strip(camera, p.name, (p,)) for p in images]
        _check_order(images, path)
        return [Strip(camera, "", tuple(images))]
    if one and not _is_video(path):
        raise InputError(f"--strip is for a folder of images that follow each other, and {path} is one: leave it out")
    return [Strip(camera, "" if _is_video(path) else path.name, (path,))]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in _VIDEOS


def _endless(strips: Sequence[Strip]) -> bool:
    """Whether strips are inspected, not plates."""
    return not all(s.single for s in strips)


def _check_order(paths: Sequence[Path], root: Path) -> None:
    """Refuses images that would follow each other as 1, 10, 2.

    Raises:
      InputError: plain and natural order of the names differ.
    """

    def natural(path: Path) -> list[str | int]:
        parts = re.split("([0-9]+)", os.path.relpath(path, root))
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    for plain, meant in zip(paths, sorted(paths, key=natural), strict=True):
        if plain != meant:
            raise InputError(
                f"in {root}, {plain.name} would come before {meant.name}: pad the numbers in the names with zeros, since images "
                "of a strip follow each other in plain order"
            )


def _stamp(strips: Sequence[Strip], source: Path) -> str:
    """Of names, sizes and times: whether the files are those of the first start, without reading what may be long."""
    root = source if source.is_dir() else source.parent
    try:
        stats = [(path, path.stat()) for strip in strips for path in strip.paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its name") from None
    return _digest([[os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def _digest(listed: Any) -> str:
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class View:
    """The detector's opened map of a band, tile by tile, each with its halo."""

    def __init__(self, detector: Trained, config: configs.Inspection):
        self.tile, self.halo = config.tile_px, config.halo_px
        core = slice(self.halo, self.halo + self.tile)

        def one(state, image):
            raw = detector.detector.residual(state, image.astype(jnp.float32) / 255)
            return grey_opening(raw, radius=detector.radius)[core, core]

        self._state = detector.state
        self._program = jax.jit(jax.vmap(one, in_axes=(None, 0)), compiler_options=cpu_compiler_options())

    def cores(self, pieces: np.ndarray) -> np.ndarray:
        """Opened maps float32 `[n, tile, tile]` of tiles with their halos, uint8 `[n, tile + 2 halo, tile + 2 halo]`."""
        return _finite(np.concatenate(jax.device_get(self._begin(pieces)))[: len(pieces)])

    def whole(self, band: Band) -> np.ndarray:
        """The band's tiles that do not stick out, without their halos: uint8 `[n, tile, tile]`."""
        rows = band.pixels[self.halo : self.halo + self.tile]
        n = rows.shape[1] // self.tile if band.height == self.tile else 0
        return rows[:, : n * self.tile].reshape(self.tile, n, self.tile).transpose(1, 0, 2)

    def _begin(self, pieces: np.ndarray) -> list[jax.Array]:
        # One program for all; on CPU a batch's activations would leave the caches.
        size = 1 if jax.default_backend() == "cpu" else _BATCH
        padded = np.concatenate([pieces, np.repeat(pieces[-1:], -len(pieces) % size, 0)])
        return [self._program(self._state, batch) for batch in padded.reshape(-1, size, *pieces.shape[1:])]

    def maps(self, bands: Iterable[tuple[int, Band]]) -> Iterator[tuple[int, Band, np.ndarray]]:
        """(strip, band, opened map float32 `[height, w]`); the device works on one band while the next is prepared."""
        waiting: list[tuple[int, Band, list[jax.Array]]] = []
        for strip, band in bands:
            waiting.append((strip, band, self._begin(tiles.cut(band, tile=self.tile, halo=self.halo))))
            if len(waiting) > 1:
                yield self._end(waiting.pop(0))
        for last in waiting:
            yield self._end(last)

    def _end(self, item: tuple[int, Band, list[jax.Array]]) -> tuple[int, Band, np.ndarray]:
        strip, band, batches = item
        count = -(-band.pixels.shape[1] // self.tile)
        return strip, band, tiles.join(_finite(np.concatenate(jax.device_get(batches))[:count]), band)


def _finite(maps: np.ndarray) -> np.ndarray:
    if not np.isfinite(maps).all():
        raise InputError("the detector's map is not finite, so nothing can be said: train the model again", status=1)
    return maps


def _bands(
    strips: Sequence[Strip],
    view: View,
    update: Update,
    *,
    first: int = 0,
    skip: int = 0,
    cut_short: dict[int, str] | None = None,
) -> Iterator[tuple[int, Band]]:
    """Bands of the strips from `first` on, of which `skip` bands are left out; frames and pixels read go to `update`.

    A video that is cut short ends there, and its sentence is in `cut_short` before its last band comes.
    """
    frames, pixels, start = sum(len(s.paths) for s in strips[:first]), 0, time.perf_counter()

    def read(i: int) -> Iterator[np.ndarray]:
        nonlocal frames, pixels
        try:
            for frame in strips[i].frames():
                yield frame
                frames, pixels = frames + 1, pixels + frame.size
                update(frames, f"{pixels / 1e6 / max(time.perf_counter() - start, 1e-9):.2f} Mpx/s")
        except video.CutShort as error:
            if cut_short is None:
                raise
            cut_short[i] = str(error)

    for i in range(first, len(strips)):
        for k, band in enumerate(tiles.bands(read(i), tile=view.tile, halo=view.halo)):
            if i > first or k >= skip:
                yield i, band


def _ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, produced in a thread up to `depth` ahead, so that reading and computing overlap."""
    waiting: queue.Queue = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class Limit(NamedTuple):
    """The threshold, the independent good scores behind it `[n]` (none without calibration), a record of both, and what drift
    is measured against: of each quantity its values `[n]` in the same tiles."""

    threshold: float
    scores: np.ndarray
    record: dict[str, Any]
    good: dict[str, np.ndarray]


def _limit(
    config: configs.Inspection,
    detector: Trained,
    view: View,
    good: Sequence[Path],
    folder: str,
    settings: dict[str, Any],
    out: Path,
) -> Limit:
    if not good:
        if detector.threshold is None:
            raise InputError(
                "the model has no threshold of its own, its run is not finished: give --calibration=FOLDER"
            )
        return Limit(detector.threshold, np.zeros(0), {"form": "none", "threshold": detector.threshold}, {})
    path = out / "calibration.json"
    names = ("model_sha256", "calibration_files", "calibration_strips", "tile_px", "halo_px", "seed")
    made_of = {k: settings[k] for k in names}
    known = files.read_json(path) if path.exists() else {}
    if known.get("made_of") != made_of:
        found = good_scores(config, detector, view, good, Path(folder), strips=settings["calibration_strips"])
        known = {"made_of": made_of, **found}
        files.write_json(path, known)
    scores = np.array(known["scores"])
    good_tiles = {"score": scores} | {name: np.array(known[name]) for name in ("brightness", "contrast")}
    record = {k: v for k, v in known.items() if k not in ("made_of", "scores", "brightness", "contrast")}
    if config.false_alarms_per_m2:
        tile_m2 = (config.tile_px * config.mm_per_px / 1000) ** 2
        modelled = calibration.tail(scores, config.false_alarms_per_m2 * tile_m2)
        per_m2 = [rate / tile_m2 for rate in modelled.rate_interval]
        record |= {"form": "model", "per_m2": config.false_alarms_per_m2, "per_m2_interval": per_m2}
        return Limit(modelled.threshold, scores, {**record, **dataclasses.asdict(modelled)}, good_tiles)
    promised = calibration.promise(scores, config.false_alarm_rate, config.confidence)
    form = "average" if config.confidence is None else "confidence"
    return Limit(promised.threshold, scores, {**record, "form": form, **dataclasses.asdict(promised)}, good_tiles)


def untrained(good: Sequence[Path], detector: Trained) -> list[Path]:
    """The images that the detector was not trained on.

    Raises:
      InputError: there is none.
    """
    found = []
    for path in good:
        # A data set in memory is known by its pixels.
        pixels = hashlib.sha256(folders.read_image(path).tobytes()).hexdigest()
        if not {folders.fingerprint(path), pixels} & detector.trained_on:
            found.append(path)
    if not found:
        raise InputError(f"all {len(good)} images in {good[0].parent} were trained on: calibrate on others")
    return found


def good_scores(
    config: configs.Inspection,
    detector: Trained,
    view: View,
    good: Sequence[Path],
    root: Path,
    *,
    strips: bool = False,
) -> dict[str, Any]:
    """Scores, brightness and contrast of one tile of each group of good images that were not trained on, and counts.

    Args:
      root: the folder of the images; a group is what lies in one of its subfolders.
      strips: the images of a group follow each other along a strip, else each is a plate.
    """
    fresh = untrained(good, detector)
    single = list({folders.fingerprint(path): path for path in reversed(fresh)}.values())[::-1]
    parts = _parts(good, set(single), root, strips)
    scores: list[float] = []
    seen: dict[str, list[float]] = {"brightness": [], "contrast": []}
    owners: list[str] = []
    with progress("calibrate", len(single), "images") as update:
        for i, band in _ahead(_bands([strip for _, strip in parts], view, update)):
            # What is smaller than a tile is not the unit.
            if band.offset + band.height == view.tile <= band.pixels.shape[1]:
                pieces = tiles.cut(band, tile=view.tile, halo=view.halo)
                maps = view.cores(pieces)
                scores += maps.max((1, 2)).tolist()
                core = slice(view.halo, view.halo + view.tile)
                for name, values in drift.measure(pieces[:, core, core]).items():
                    seen[name] += values.tolist()
                owners += [parts[i][0]] * len(maps)
    if not scores:
        raise InputError(f"no image in {root} is as large as a tile of {view.tile} pixels: use a smaller --tile_px")
    drawn = calibration.one_per_group(scores, owners, seed=config.seed)
    return {
        "images": len(single),
        "left_out_as_trained_on": len(good) - len(fresh),
        "left_out_as_copies": len(fresh) - len(single),
        "tiles": len(scores),
        "groups": len(drawn),
        "scores": drawn.tolist(),
        # The same draws.
        **{k: calibration.one_per_group(v, owners, seed=config.seed).tolist() for k, v in seen.items()},
    }


def _parts(good: Sequence[Path], used: set[Path], root: Path, strips: bool) -> list[tuple[str, Strip]]:
    """Groups and what is inspected of them as one: images that follow each other, or each image.

    Raises:
      InputError: names of a strip's images are not in order.
    """
    groups: dict[str, list[Path]] = {}
    for path in good:
        groups.setdefault(path.relative_to(root).parts[0], []).append(path)
    found = []
    for group, members in groups.items():
        if strips:
            _check_order(members, root)
        run: list[Path] = []
        # An image that is left out is a gap.
        for path, following in zip(members, [*members[1:], None], strict=True):
            run += [path] if path in used else []
            if run and not (strips and path in used and following in used):
                found.append((group, Strip(Camera(), "", tuple(run))))
                run = []
    return found


@dataclasses.dataclass
class _Found:
    """What has been found so far: rows of the ledger, scores of all tiles, sizes `[h, w]` of the finished strips; of the worst
    rows, by their index, close-ups as PNG in base64; what drift is looked for in, by quantity."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scores: array = dataclasses.field(default_factory=lambda: array("d"))
    sizes: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    close_ups: dict[int, str] = dataclasses.field(default_factory=dict)
    worst: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    cut_short: list[str] = dataclasses.field(default_factory=list)  # sentences
    drawn: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    inspected_now: int = 0  # pixels, since this start

    def wants(self, peak: float) -> bool:
        return len(self.worst) < _WORST or peak > self.worst[0][0]

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a line of the journal."""
        self.scores.extend(record["scores"])
        for name, value in record.get("drawn", {}).items():
            self.drawn.setdefault(name, []).append(value)
        if record["finished"]:
            self.sizes[record["strip"]] = record["size"]
            self.cut_short += [record["cut_short"]] if record["cut_short"] else []
        for row, close_up in zip(record["rows"], record["close_ups"], strict=True):
            if close_up is not None and self.wants(row["peak"]):
                # Of equal peaks the first stay.
                heapq.heappush(self.worst, (row["peak"], -len(self.rows)))
                self.close_ups[len(self.rows)] = close_up
                if len(self.worst) > _WORST:
                    del self.close_ups[-heapq.heappop(self.worst)[1]]
            self.rows.append(row)


class _Journal:
    """One line a band: what was found in it, and all it takes to go on after it."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> Iterator[dict[str, Any]]:
        """The whole lines; a last one that was cut short is removed from the file."""
        if not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    record = None
                if record is None:
                    break
                whole += len(line)
                yield record
        with self._path.open("r+b") as file:
            file.truncate(whole)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
          InputError: the disk is full.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written ({error.strerror}): free some space, then run again to go on", status=1
            ) from None


def _inspect(view: View, strips: Sequence[Strip], limit: Limit, frames: int, out: Path) -> _Found:
    found, journal = _Found(), _Journal(out / "journal.jsonl")
    record: dict[str, Any] | None = None
    for record in journal.read():
        found.add(record)
    first, skip = 0, 0
    before: tuple[ledger.Open, dict[tuple[int, int], str]] | None = None
    if record is not None:
        first, skip = (record["strip"] + 1, 0) if record["finished"] else (record["strip"], record["bands"])
        before = None if record["finished"] else _opened_again(record)

    def note(strip: int, regions: Sequence[ledger.Region], crops: dict[tuple[int, int], str], **state: Any) -> None:
        source = strips[strip]
        p = calibration.p_values([r.peak for r in regions], limit.scores).tolist()
        rows = [
            ledger.row(r, source.camera, image=source.image, p_value=value if limit.scores.size else None)
            for r, value in zip(regions, p, strict=True)
        ]
        close_ups = [crops.get((r.peak_y, r.peak_x)) for r in regions]
        line = {
            "strip": strip,
            "finished": False,
            "cut_short": None,
            "scores": [],
            "rows": rows,
            "close_ups": close_ups,
            **state,
        }
        journal.write(line)
        found.add(line)

    crops: dict[tuple[int, int], str] = {}
    cut_short: dict[int, str] = {}
    at, done, size, pending = -1, 0, [0, 0], ledger.nothing(0)
    if before is not None and record is not None:
        at, done, size = first, skip, record["size"]
        pending, crops = before
    warned = {one.quantity for one in drift.history(found.drawn, limit.good)} if limit.good else set()
    with progress("inspect", frames, "frames") as update:
        bands = _bands(strips, view, update, first=first, skip=skip, cut_short=cut_short)
        for strip, band, opened in view.maps(_ahead(bands)):
            if strip != at:
                if at >= 0:
                    note(at, pending.regions, crops, finished=True, size=size, cut_short=cut_short.get(at))
                at, done, pending, crops = strip, 0, ledger.nothing(opened.shape[1]), {}
            if limit.scores.size:
                _check_size(strips[strip].paths[0], (band.offset + band.height, opened.shape[1]), view.tile)
            closed, pending = ledger.advance(pending, opened, limit.threshold, top=band.top)
            # Who is not among the worst now will not be later.
            wanted = [r for r in (*closed, *pending.regions) if found.wants(r.peak)]
            crops = _crops(crops, band, view.halo, wanted)
            found.inspected_now += opened.size
            done, size = done + 1, [band.top + band.height, opened.shape[1]]
            scores = tiles.maxima(opened, view.tile).tolist()
            drawn = _drawn(view.whole(band), scores, strip, done) if done == 1 or not strips[strip].image else {}
            left = {(r.peak_y, r.peak_x) for r in pending.regions}
            state = {"bands": done, "size": size, "open": _to_json(pending, crops)}
            note(strip, closed, crops, scores=scores, drawn=drawn, **state)
            for one in drift.moved(found.drawn, limit.good) if drawn and limit.good else ():
                if one.quantity not in warned:
                    print(f"warning: {one}", flush=True)
                    warned.add(one.quantity)
            crops = {key: crop for key, crop in crops.items() if key in left}
    if at >= 0:
        note(at, pending.regions, crops, finished=True, size=size, cut_short=cut_short.get(at))
    return found


def _drawn(whole: np.ndarray, scores: Sequence[float], strip: int, band: int) -> dict[str, float]:
    """Score, brightness and contrast of one random tile of a band `[n, tile, tile]`; nothing of a band without a whole one."""
    if not len(whole):
        return {}
    k = int(np.random.default_rng([strip, band, 0xD4]).integers(len(whole)))
    return {"score": scores[k]} | {name: float(v[0]) for name, v in drift.measure(whole[k : k + 1]).items()}


def _crops(
    known: dict[tuple[int, int], str], band: Band, halo: int, regions: Sequence[ledger.Region]
) -> dict[tuple[int, int], str]:
    """Close-ups around the regions' peaks, those of earlier bands as they are known."""
    crops = {}
    rows, columns = band.pixels.shape
    for r in regions:
        key = (r.peak_y, r.peak_x)
        if key in known:
            crops[key] = known[key]
            continue
        centre = r.peak_y - (band.top - band.offset) + halo
        y, x = (
            int(np.clip(c - _CLOSE_UP_PX // 2, 0, max(0, n - _CLOSE_UP_PX)))
            for c, n in ((centre, rows), (r.peak_x, columns))
        )
        crop = np.ascontiguousarray(band.pixels[y : y + _CLOSE_UP_PX, x : x + _CLOSE_UP_PX])
        crops[key] = base64.b64encode(folders.png(crop)).decode()
    return crops


def _to_json(state: ledger.Open, crops: dict[tuple[int, int], str]) -> dict[str, Any]:
    if not state.regions:
        return {"width": state.labels.size}
    edges = np.flatnonzero(np.diff(state.labels)) + 1
    starts = np.concatenate([[0], edges]).tolist()
    return {
        "width": state.labels.size,
        "runs": [[start, int(state.labels[start])] for start in starts],
        "regions": [dataclasses.astuple(r) for r in state.regions],
        "close_ups": [crops.get((r.peak_y, r.peak_x)) for r in state.regions],
    }


def _opened_again(record: dict[str, Any]) -> tuple[ledger.Open, dict[tuple[int, int], str]]:
    stored = record["open"]
    if "regions" not in stored:
        return ledger.nothing(stored["width"]), {}
    labels = np.zeros(stored["width"], np.int32)
    for start, label in stored["runs"]:
        labels[start:] = label
    names = [f.name for f in dataclasses.fields(ledger.Region)]
    kept = [dict(zip(names, fields, strict=True)) for fields in stored["regions"]]
    regions = [ledger.Region(**{**fields, "sums": tuple(fields["sums"])}) for fields in kept]
    crops = {(r.peak_y, r.peak_x): crop for r, crop in zip(regions, stored["close_ups"], strict=True) if crop}
    return ledger.Open(tuple(regions), labels), crops


def _write(
    config: configs.Inspection,
    strips: Sequence[Strip],
    found: _Found,
    limit: Limit,
    settings: dict[str, Any],
    seconds: float,
    out: Path,
) -> dict[str, Any]:
    from steel_ad.report import figures, page

    numbered = [{**row, "index": i} for i, row in enumerate(found.rows)]
    rows = ledger.ordered(ledger.deduplicated(numbered, [s.camera for s in strips]))
    close_ups = {}
    for row in rows:
        if (crop := found.close_ups.get(row.pop("index"))) is not None:
            close_ups[row["defect"]] = base64.b64decode(crop)
    rolls = _rolls(config, strips, found, rows)
    scores = np.array(found.scores)
    alarmed = int(np.count_nonzero(scores > limit.threshold))
    summary = {
        "defects": len(rows),
        "tiles": len(scores),
        "tiles_with_an_alarm": alarmed,
        "threshold": limit.threshold,
        "calibration": limit.record,
        "recurrence": rolls,
        "cut_short": found.cut_short,
        "drift": [str(one) for one in drift.history(found.drawn, limit.good)] if limit.good else None,
        "megapixels": sum(h * w for h, w in found.sizes.values()) / 1e6,
        "megapixels_per_second": found.inspected_now / 1e6 / seconds if seconds > 0 else None,
        "settings": settings,
        "versions": runs.versions(),
    }
    columns = list(rows[0]) if rows else ["defect", *ledger.COLUMNS]
    files.write_csv(out / "ledger.csv", rows, columns)
    files.write_text(out / "ledger.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for defect, png in close_ups.items():
        files.write_bytes(out / "close_ups" / f"{defect:06d}.png", png)
    # A name that is not UTF-8 cannot be drawn.
    name = Path(settings["source"]).name.encode("utf-8", "backslashreplace").decode()
    counted = f"{len(rows)} defect{'s' * (len(rows) != 1)}"
    sides, unit = _coil(strips, found, rows, rolls)
    coil = figures.coil_map(out / "coil_map.png", sides, unit=unit, title=f"{name}: {counted}")
    histogram = figures.score_histogram(
        out / "scores.png",
        limit.scores if limit.scores.size else scores,
        {"inspected": scores} if limit.scores.size else {},
        threshold=limit.threshold,
        of="tile",
        title="tile scores" + (" of calibration (above) and inspection" if limit.scores.size else ""),
    )
    verdict = f"{counted} in {alarmed} of {len(scores)} tiles." if rows else f"Clean: no defect in {len(scores)} tiles."
    verdict = " ".join([verdict, *(f"Not all was inspected: {sentence}." for sentence in found.cut_short)])
    files.write_text(
        out / "report.html",
        page.inspection(
            title=f"Inspection of {name}",
            verdict=verdict,
            clean=not rows and not found.cut_short,
            facts=[*_facts(summary), *((k, str(v)) for k, v in settings.items())],
            pictures=[("Where the defects lie", coil.read_bytes()), ("Tile scores", histogram.read_bytes())],
            rows=sorted(rows, key=lambda r: -r["peak"])[:_LISTED],
            close_ups=close_ups,
            note=f"The {_LISTED} highest peaks of {len(rows)} are listed; all are in ledger.csv."
            if len(rows) > _LISTED
            else "",
        ),
    )
    # Last, since its presence says that the inspection is complete.
    files.write_json(out / "summary.json", summary)
    return summary


def promise_sentence(record: dict[str, Any]) -> str:
    """What a summary's `calibration` promises, in one or two sentences."""
    if record["form"] == "none":
        return "No calibration images were given, so nothing is promised of false alarms: the threshold is the training run's."
    copies = f", {record['left_out_as_copies']} as copies" if record.get("left_out_as_copies") else ""
    counted = (
        f"{record['groups']} independent good tiles, one of each of {record['groups']} groups ({record['images']} images, "
        f"{record['left_out_as_trained_on']} more left out because they were trained on{copies})"
    )
    if record["form"] == "model":
        low, high = record["per_m2_interval"]
        return (
            f"By a model of the tail, which no set of good images can prove: {record['per_m2']:g} false alarms per square metre "
            f"(95 % interval {low:.2g} to {high:.2g}), fitted to the highest {record['exceedances']} of {counted}."
        )
    return (
        f"Of good tiles, at most {record['average_rate']:.3g} raise a false alarm on average over calibrations; with confidence "
        f"{record['confidence']:g}, at most {record['confident_rate']:.3g}. From {counted}."
    )


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("promise", promise_sentence(summary["calibration"])), ("threshold", f"{summary['threshold']:.6g}")]
    if not summary["settings"]["training_finished"]:
        facts.append(("training", "The model's training run is not finished: this is its newest checkpoint."))
    facts += [(f"recurrence, {r['side']}", r["sentence"]) for r in summary["recurrence"]]
    facts += [("drift", sentence) for sentence in summary["drift"] or ()]
    speed = summary["megapixels_per_second"]
    if speed is not None:
        facts.append(("inspected", f"{summary['megapixels']:.2f} Mpx, {speed:.2f} Mpx/s"))
    return [*facts, ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))]


def _rolls(
    config: configs.Inspection, strips: Sequence[Strip], found: _Found, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Periods of the defects on endless strips, by side, or by camera where a scale is not known; several rolls may be damaged."""
    results = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        own = [i for i, s in enumerate(strips) if s.camera.side == side and not s.single]
        metric = all(strips[i].camera.mm_per_px for i in own)
        for members in [own] if metric and own else [[i] for i in own]:
            results += _periods(config, {i: strips[i] for i in members}, found, rows, "mm" if metric else "px")
    return results


def _periods(
    config: configs.Inspection, strips: Mapping[int, Strip], found: _Found, rows: Sequence[dict[str, Any]], unit: str
) -> list[dict[str, Any]]:
    """Of strips side by side."""
    metric = unit == "mm"
    scales = {i: s.camera.mm_per_px or 1 if metric else 1 for i, s in strips.items()}
    cameras = {s.camera.name: s.camera for s in strips.values()}
    length = max(found.sizes[i][0] * scale for i, scale in scales.items())
    seen = [r for r in rows if r["camera"] in cameras and not r["image"]]
    seen = sorted(seen, key=lambda r: -r["peak"])[:_LISTED]
    results: list[dict[str, Any]] = []
    for _ in range(5):
        one = recurrence.find(
            [r[f"along_{unit}"] for r in seen],
            [r[f"across_{unit}"] for r in seen],
            length,
            tolerance_mm=_PLACE_MM if metric else _PLACE_PX,
            look=np.log([[r["length_px"], r["width_px"]] for r in seen]).reshape(-1, 2),
            pitch_mm=config.pitch_mm if metric and config.pitch_mm else None,
            seed=config.seed,
        )
        if one is None or not one.periodic:
            break
        suspect = _own_period(one.period_mm, config.tile_px, strips, scales)
        results.append(
            {
                "side": next(iter(cameras.values())).side,
                "cameras": list(cameras),
                "unit": unit,
                "period": one.period_mm,
                "roll_diameter": one.roll_diameter_mm,
                "phase": one.phase_mm,
                "turns": one.turns,
                "turns_seen": one.seen,
                "p_value": one.p_value,
                "members": sorted(seen[k]["defect"] for k in one.members),
                "sentence": " ".join([recurrence.summary(one, unit), *suspect]),
            }
        )
        seen = [r for k, r in enumerate(seen) if k not in set(one.members)]
    return results


def _own_period(period: float, tile: int, strips: Mapping[int, Strip], scales: Mapping[int, float]) -> list[str]:
    """Sentences where a period is one that the camera or the inspection brings along."""
    found = {}
    for i, strip in strips.items():
        # Of many multiples one is near by chance.
        for what, side in (("tile", tile), ("frame", next(strip.frames()).shape[0])):
            step = side * scales[i]
            times = round(period / step)
            if times and abs(period - times * step) <= min(0.01 * period, 0.05 * step):
                number = "the height" if times == 1 else f"{times} times the height"
                found[what] = (
                    f"This is {number} of a {what}, so look whether the {what} makes the marks rather than a roll."
                )
    return list(found.values())


def _coil(strips: Sequence[Strip], found: _Found, rows: Sequence[dict[str, Any]], rolls: Sequence[dict[str, Any]]):
    """Sides for the coil map, images laid end to end in the order of their names, and the unit."""
    from steel_ad.report.figures import Coil

    metric = all(s.camera.mm_per_px for s in strips)
    unit = "mm" if metric else "px"
    periodic = {defect for roll in rolls for defect in roll["members"]}
    sides = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        lengths: dict[str, float] = {}
        edges = []
        for i, s in enumerate(strips):
            if s.camera.side == side:
                h, w = (n * (s.camera.mm_per_px or 1 if metric else 1) for n in found.sizes[i])
                start = s.camera.across_mm if metric else 0.0
                lengths[s.image] = max(lengths.get(s.image, 0), h)
                edges.append((start, start + w))
        ends = np.cumsum([lengths[name] for name in sorted(lengths)])
        offsets = dict(zip(sorted(lengths), [0.0, *ends], strict=False))
        scale = {s.camera.name: s.camera.mm_per_px or 1 if metric else 1 for s in strips}
        across = {s.camera.name: s.camera.across_mm if metric else 0.0 for s in strips}
        own = [r for r in rows if r["side"] == side]
        boxes = [
            [
                offsets[r["image"]] * d + start + r[f"{edge}_px"] * scale[r["camera"]]
                for edge, d, start in (
                    ("top", 1, 0.0),
                    ("left", 0, across[r["camera"]]),
                    ("bottom", 1, 0.0),
                    ("right", 0, across[r["camera"]]),
                )
            ]
            for r in own
        ]
        first = min(a for a, _ in edges)
        sides.append(
            Coil(
                name=side,
                length=float(ends[-1]),
                width=max(b for _, b in edges) - first,
                across=first,
                joints=ends[:-1].tolist(),
                boxes=np.array(boxes, np.float64).reshape(-1, 4),
                scores=np.array([r["peak"] for r in own], np.float64),
                periodic=np.array([r["defect"] in periodic for r in own], bool),
            )
        )
    return sides, unit
