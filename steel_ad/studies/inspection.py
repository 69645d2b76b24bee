"""The inspection: strips and images through a trained detector to a list of defects and a report."""

import base64
import dataclasses
import heapq
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad.data import folders, video
from steel_ad.errors import InputError
from steel_ad.inspection import calibration, drift, ledger, tiles
from steel_ad.inspection.tiles import Band
from steel_ad.progress import progress
from steel_ad.studies import files, good_tiles, outcome, runs, trained
from steel_ad.studies import strips as sources
from steel_ad.studies.good_tiles import Limit
from steel_ad.studies.strips import Strip, View
from steel_ad.studies.trained import Trained

_WORST = 24
_CLOSE_UP_PX = 96
_LISTED = 2000


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
    cameras = sources.cameras(Path(source), config.mm_per_px or None)
    check_out(out, [calibrate_on, *(where for _, where in cameras)])
    strips = [s for camera, where in cameras for s in sources.strips_of(where, camera, config.strip)]
    _check_flags(config, strips, calibrate_on)
    good = good_tiles.good_images(calibrate_on) if calibrate_on else []
    settings = {
        **dataclasses.asdict(config),
        "model": str(model),
        "model_sha256": detector.sha256,
        "source": source,
        "source_files": sources.stamp(strips, Path(source)),
        "calibration": calibrate_on,
        "calibration_files": sources.digest([[os.path.relpath(p, calibrate_on), folders.fingerprint(p)] for p in good]),
        "calibration_strips": bool(good) and sources.endless(strips),
        "training_finished": detector.finished,
        **({} if good else {"training_threshold": detector.threshold}),
    }
    frames = sum(max(1, video.length(p)) if sources.is_video(p) else 1 for s in strips for p in s.paths)
    claimed = out / "inspection.json"
    if claimed.exists() and (other := configs.difference(settings, files.read_json(claimed))):
        raise InputError(f"{out} holds another inspection, which differs in {other}: use a new --out")
    if (out / "summary.json").exists():
        return files.read_json(out / "summary.json")
    for s in strips if good else ():
        if s.single:
            _check_size(s.paths[0], folders.image_shape(s.paths[0]), config.tile_px)
    view = View(detector, config)
    limit = good_tiles.limit(config, detector, view, good, calibrate_on, settings, out)
    # Not before the calibration, so that after a refusal another rate may be asked for in the same place.
    files.write_json(claimed, settings)
    start = time.perf_counter()
    found = _inspect(view, strips, limit, frames, out)
    if not found.scores:
        # Nothing to keep: once the file is mended, it is another one.
        for name in ("journal.jsonl", "inspection.json"):
            (out / name).unlink(missing_ok=True)
        raise InputError(
            found.unread[0] if found.unread else f"{source} shows nothing: name another --source", status=1
        )
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


@dataclasses.dataclass
class _Found:
    """What has been found so far: rows of the ledger, scores of all tiles, sizes `[h, w]` of the finished strips; of the worst
    rows, by their index, close-ups as PNG in base64; what drift is looked for in, by quantity."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scores: array = dataclasses.field(default_factory=lambda: array("d"))
    sizes: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    close_ups: dict[int, str] = dataclasses.field(default_factory=dict)
    worst: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)  # sentences
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
            self.unread += [record["unread"]] if record["unread"] else []
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
            "unread": None,
            "scores": [],
            "rows": rows,
            "close_ups": close_ups,
            **state,
        }
        journal.write(line)
        found.add(line)

    crops: dict[tuple[int, int], str] = {}
    unread: dict[int, str] = {}
    at, done, size, pending = first - 1, 0, [0, 0], ledger.nothing(0)
    if before is not None and record is not None:
        at, done, size = first, skip, record["size"]
        pending, crops = before

    def finish(following: int) -> None:
        """Closes the strip that is under way, and those up to the following one of which nothing could be read."""
        if done:
            note(at, pending.regions, crops, finished=True, size=size, unread=unread.get(at))
        for i in range(at + 1, following):
            note(i, (), {}, finished=True, size=[0, 0], unread=unread.get(i))

    warned = {one.quantity for one in drift.history(found.drawn, limit.good)} if limit.good else set()
    with progress("inspect", frames, "frames") as update:
        bands = sources.bands(strips, view, update, first=first, skip=skip, unread=unread)
        for strip, band, opened in view.maps(sources.ahead(bands)):
            if strip != at:
                finish(strip)
                at, done, pending, crops = strip, 0, ledger.nothing(opened.shape[1]), {}
            if limit.scores.size:
                _check_size(strips[strip].paths[0], (band.offset + band.height, opened.shape[1]), view.tile)
            closed, pending = ledger.advance(pending, opened, limit.threshold, top=band.top)
            # Who is not among the worst now will not be later.
            wanted = [r for r in (*closed, *pending.regions) if found.wants(r.peak)]
            crops = _crops(crops, band, wanted)
            found.inspected_now += opened.size
            done, size = done + 1, [band.top + band.height, opened.shape[1]]
            scores = tiles.maxima(opened, view.tile).tolist()
            drawn = _drawn(view.whole(band), scores, strip, done) if done == 1 or not strips[strip].single else {}
            left = {(r.peak_y, r.peak_x) for r in pending.regions}
            state = {"bands": done, "size": size, "open": _to_json(pending, crops)}
            note(strip, closed, crops, scores=scores, drawn=drawn, **state)
            for one in drift.moved(found.drawn, limit.good) if drawn and limit.good else ():
                if one.quantity not in warned:
                    print(f"warning: {one}", flush=True)
                    warned.add(one.quantity)
            crops = {key: crop for key, crop in crops.items() if key in left}
    finish(len(strips))
    return found


def _drawn(whole: np.ndarray, scores: Sequence[float], strip: int, band: int) -> dict[str, float]:
    """Score, brightness and contrast of one random tile of a band `[n, tile, tile]`; nothing of a band without a whole one."""
    if not len(whole):
        return {}
    k = int(np.random.default_rng([strip, band, 0xD4]).integers(len(whole)))
    return {"score": scores[k]} | {name: float(v[0]) for name, v in drift.measure(whole[k : k + 1]).items()}


def _crops(
    known: dict[tuple[int, int], str], band: Band, regions: Sequence[ledger.Region]
) -> dict[tuple[int, int], str]:
    """Close-ups around the regions' peaks, those of earlier bands as they are known."""
    crops = {}
    rows, columns = band.pixels.shape
    for r in regions:
        key = (r.peak_y, r.peak_x)
        if key in known:
            crops[key] = known[key]
            continue
        centre = r.peak_y - (band.top - band.offset) + band.core
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
    rolls = outcome.rolls(config, strips, found.sizes, rows)
    scores = np.array(found.scores)
    alarmed = int(np.count_nonzero(scores > limit.threshold))
    summary = {
        "defects": len(rows),
        "tiles": len(scores),
        "tiles_with_an_alarm": alarmed,
        "threshold": limit.threshold,
        "calibration": limit.record,
        "recurrence": rolls,
        "unread": found.unread,
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
    sides, unit = outcome.coil(strips, found.sizes, rows, rolls)
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
    verdict = " ".join([verdict, *(f"Not all was inspected: {sentence}." for sentence in found.unread)])
    files.write_text(
        out / "report.html",
        page.inspection(
            title=f"Inspection of {name}",
            verdict=verdict,
            clean=not rows and not found.unread,
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


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("promise", good_tiles.promise_sentence(summary["calibration"])),
        ("threshold", f"{summary['threshold']:.6g}"),
    ]
    if not summary["settings"]["training_finished"]:
        facts.append(("training", "The model's training run is not finished: this is its newest checkpoint."))
    facts += [(f"recurrence, {r['side']}", r["sentence"]) for r in summary["recurrence"]]
    facts += [("drift", sentence) for sentence in summary["drift"] or ()]
    speed = summary["megapixels_per_second"]
    if speed is not None:
        facts.append(("inspected", f"{summary['megapixels']:.2f} Mpx, {speed:.2f} Mpx/s"))
    return [*facts, ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))]
