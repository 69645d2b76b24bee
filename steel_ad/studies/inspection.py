"""The inspection: strips and images through a trained detector to a list of defects and a report."""

import base64
import dataclasses
import hashlib
import heapq
import json
import queue
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.data import folders, video
from steel_ad.errors import InputError
from steel_ad.inspection import calibration, ledger, recurrence, tiles
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
      calibrate_on: folder of good images; those of one subfolder come from one strip. "": no promise, the run's own
        threshold.

    Returns:
      What `summary.json` holds.

    Raises:
      InputError: a model, source or calibration that cannot be used, too few good images, an `out` of other settings.
    """
    detector = trained.load(model, config.map)
    check_tile(config, detector)
    strips = _strips(source, config)
    good = folders.list_images(calibrate_on, recursive=True) if calibrate_on else []
    settings = {
        **dataclasses.asdict(config),
        "model": str(model),
        "model_sha256": detector.sha256,
        "source": source,
        "source_files": _digest(path for strip in strips for path in strip.paths),
        "calibration": calibrate_on,
        "calibration_files": _digest(good),
    }
    frames = sum(max(1, video.length(p)) if _is_video(p) else 1 for s in strips for p in s.paths)
    claimed = out / "inspection.json"
    if claimed.exists() and (other := configs.difference(settings, files.read_json(claimed))):
        raise InputError(f"{out} holds another inspection, which differs in {other}: use a new --out")
    if (out / "summary.json").exists():
        return files.read_json(out / "summary.json")
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


def _strips(source: str, config: configs.Inspection) -> list[Strip]:
    path = Path(source)
    if path.suffix.lower() == ".json":
        found = []
        for camera, where in _cameras(path):
            found += _strips_of(where, camera, config.strip)
        return found
    return _strips_of(path, Camera(mm_per_px=config.mm_per_px or None), config.strip)


def _cameras(path: Path) -> list[tuple[Camera, Path]]:
    rows = files.read_json(path)
    try:
        found = []
        for r in rows:
            scale = r.get("mm_per_px")
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
        return [Strip(camera, "", tuple(images))] if one else [Strip(camera, p.name, (p,)) for p in images]
    return [Strip(camera, "" if _is_video(path) else path.name, (path,))]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in _VIDEOS


def _digest(paths: Iterable[Path]) -> str:
    """Of names and sizes: whether the files are those of the first start."""
    try:
        listed = [[path.name, path.stat().st_size] for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its name") from None
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
        return np.concatenate(jax.device_get(self._begin(pieces)))[: len(pieces)]

    def _begin(self, pieces: np.ndarray) -> list[jax.Array]:
        size = min(_BATCH, len(pieces))
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
        return strip, band, tiles.join(np.concatenate(jax.device_get(batches))[:count], band)


def _bands(
    strips: Sequence[Strip], view: View, update: Update, *, first: int = 0, skip: int = 0
) -> Iterator[tuple[int, Band]]:
    """Bands of the strips from `first` on, of which `skip` bands are left out; frames and pixels read go to `update`."""
    frames, pixels, start = sum(len(s.paths) for s in strips[:first]), 0, time.perf_counter()

    def read(strip: Strip) -> Iterator[np.ndarray]:
        nonlocal frames, pixels
        for frame in strip.frames():
            yield frame
            frames, pixels = frames + 1, pixels + frame.size
            update(frames, f"{pixels / 1e6 / max(time.perf_counter() - start, 1e-9):.2f} Mpx/s")

    for i in range(first, len(strips)):
        for k, band in enumerate(tiles.bands(read(strips[i]), tile=view.tile, halo=view.halo)):
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
    """The threshold, the independent good scores behind it `[n]` (none without calibration), and a record of both."""

    threshold: float
    scores: np.ndarray
    record: dict[str, Any]


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
        return Limit(detector.threshold, np.zeros(0), {"form": "none", "threshold": detector.threshold})
    path = out / "calibration.json"
    made_of = {k: settings[k] for k in ("model_sha256", "calibration_files", "tile_px", "halo_px", "seed")}
    known = files.read_json(path) if path.exists() else {}
    if known.get("made_of") != made_of:
        known = {"made_of": made_of, **good_scores(config, detector, view, good, Path(folder))}
        files.write_json(path, known)
    scores = np.array(known["scores"])
    record = {k: v for k, v in known.items() if k not in ("made_of", "scores")}
    if config.false_alarms_per_m2:
        tile_m2 = (config.tile_px * config.mm_per_px / 1000) ** 2
        modelled = calibration.tail(scores, config.false_alarms_per_m2 * tile_m2)
        per_m2 = [rate / tile_m2 for rate in modelled.rate_interval]
        record |= {"form": "model", "per_m2": config.false_alarms_per_m2, "per_m2_interval": per_m2}
        return Limit(modelled.threshold, scores, {**record, **dataclasses.asdict(modelled)})
    promised = calibration.promise(scores, config.false_alarm_rate, config.confidence)
    form = "average" if config.confidence is None else "confidence"
    return Limit(promised.threshold, scores, {**record, "form": form, **dataclasses.asdict(promised)})


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
    config: configs.Inspection, detector: Trained, view: View, good: Sequence[Path], root: Path
) -> dict[str, Any]:
    """The highest value of one whole tile of each group of good images that were not trained on, and counts."""
    fresh = untrained(good, detector)
    strips = [Strip(Camera(), "", (path,)) for path in fresh]
    groups = [str(path if path.parent == root else path.parent) for path in fresh]
    scores: list[float] = []
    owners: list[str] = []
    with progress("calibrate", len(strips), "images") as update:
        for i, band, opened in view.maps(_ahead(_bands(strips, view, update))):
            # Tiles that stick out of an image are not the unit: what they show is less.
            whole = band.pixels.shape[1] // view.tile if band.height == view.tile else 0
            scores += tiles.maxima(opened, view.tile)[:whole].tolist()
            owners += [groups[i]] * whole
    if not scores:
        raise InputError(f"no image in {root} is as large as a tile of {view.tile} pixels: use a smaller --tile_px")
    single = calibration.one_per_group(scores, owners, seed=config.seed)
    return {
        "images": len(strips),
        "left_out_as_trained_on": len(good) - len(strips),
        "tiles": len(scores),
        "groups": len(single),
        "scores": single.tolist(),
    }


@dataclasses.dataclass
class _Found:
    """What has been found so far: rows of the ledger, scores of all tiles, sizes `[h, w]` of the finished strips; of the worst
    rows, by their index, close-ups as PNG in base64."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scores: array = dataclasses.field(default_factory=lambda: array("d"))
    sizes: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    close_ups: dict[int, str] = dataclasses.field(default_factory=dict)
    worst: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    inspected_now: int = 0  # pixels, since this start

    def wants(self, peak: float) -> bool:
        return len(self.worst) < _WORST or peak > self.worst[0][0]

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a line of the journal."""
        self.scores.extend(record["scores"])
        if record["finished"]:
            self.sizes[record["strip"]] = record["size"]
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
        line = {"strip": strip, "finished": False, "scores": [], "rows": rows, "close_ups": close_ups, **state}
        journal.write(line)
        found.add(line)

    crops: dict[tuple[int, int], str] = {}
    at, done, size, pending = -1, 0, [0, 0], ledger.nothing(0)
    if before is not None and record is not None:
        at, done, size = first, skip, record["size"]
        pending, crops = before
    with progress("inspect", frames, "frames") as update:
        for strip, band, opened in view.maps(_ahead(_bands(strips, view, update, first=first, skip=skip))):
            if strip != at:
                if at >= 0:
                    note(at, pending.regions, crops, finished=True, size=size)
                at, done, pending, crops = strip, 0, ledger.nothing(opened.shape[1]), {}
            closed, pending = ledger.advance(pending, opened, limit.threshold, top=band.top)
            crops = _crops(crops, band, view.halo, [r for r in closed if found.wants(r.peak)] + list(pending.regions))
            found.inspected_now += opened.size
            done, size = done + 1, [band.top + band.height, opened.shape[1]]
            scores = tiles.maxima(opened, view.tile).tolist()
            left = {(r.peak_y, r.peak_x) for r in pending.regions}
            note(strip, closed, crops, scores=scores, bands=done, size=size, open=_to_json(pending, crops))
            crops = {key: crop for key, crop in crops.items() if key in left}
    if at >= 0:
        note(at, pending.regions, crops, finished=True, size=size)
    return found


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
        centre = r.peak_y - band.top + halo
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
        "close_ups": [crops[r.peak_y, r.peak_x] for r in state.regions],
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
    crops = {(r.peak_y, r.peak_x): crop for r, crop in zip(regions, stored["close_ups"], strict=True)}
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
    name = Path(settings["source"]).name
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
    files.write_text(
        out / "report.html",
        page.inspection(
            title=f"Inspection of {name}",
            verdict=verdict,
            clean=not rows,
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
    counted = (
        f"{record['groups']} independent good tiles, one of each of {record['groups']} groups ({record['images']} images, "
        f"{record['left_out_as_trained_on']} more left out because they were trained on)"
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
    facts += [(f"recurrence, {r['side']}", r["sentence"]) for r in summary["recurrence"]]
    speed = summary["megapixels_per_second"]
    if speed is not None:
        facts.append(("inspected", f"{summary['megapixels']:.2f} Mpx, {speed:.2f} Mpx/s"))
    return [*facts, ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))]


def _rolls(
    config: configs.Inspection, strips: Sequence[Strip], found: _Found, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Periods of the defects on endless strips, by side; several rolls may be damaged."""
    results = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        members = [i for i, s in enumerate(strips) if s.camera.side == side and not s.image]
        if not members:
            continue
        scales = [strips[i].camera.mm_per_px for i in members]
        metric = None not in scales
        unit = "mm" if metric else "px"
        length = max(
            found.sizes[i][0] * (scale if metric and scale else 1) for i, scale in zip(members, scales, strict=True)
        )
        seen = [r for r in rows if r["side"] == side and not r["image"]]
        seen = sorted(seen, key=lambda r: -r["peak"])[:_LISTED]
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
            results.append(
                {
                    "side": side,
                    "unit": unit,
                    "period": one.period_mm,
                    "roll_diameter": one.roll_diameter_mm,
                    "phase": one.phase_mm,
                    "turns": one.turns,
                    "p_value": one.p_value,
                    "members": sorted(seen[k]["defect"] for k in one.members),
                    "sentence": recurrence.summary(one, unit),
                }
            )
            seen = [r for k, r in enumerate(seen) if k not in set(one.members)]
    return results


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
