"""The inspection: strips and images through a trained detector to a list of defects and a report."""

import base64
import copy
import dataclasses
import heapq
import json
import os
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import folders, video
from steel_ad.detectors import Fitted
from steel_ad.errors import InputError
from steel_ad.inspection import calibration, drift, good_tiles, ledger, outcome, tiles, watch
from steel_ad.inspection import strips as sources
from steel_ad.inspection.good_tiles import Limit
from steel_ad.inspection.ledger import Camera
from steel_ad.inspection.strips import Strip, View
from steel_ad.inspection.tiles import Band, Cutter
from steel_ad.progress import progress
from steel_ad.versions import versions

_WORST = 24
_CLOSE_UP_PX = 96
_LISTED = 2000
# A watched folder's report is written at most so often, or a tenth of the time, and while there is more to inspect, so often.
_REFRESH_S, _REFRESH_BUSY_S = 5.0, 60.0
_POLL_S = 0.5
_CHECKSUM = b', "crc32": '


def run(
    config: configs.Inspection,
    detector: Fitted,
    *,
    source: str,
    calibrate_on: str,
    out: Path,
    watch_idle_s: float | None = None,
) -> dict[str, Any]:
    """Inspects, and writes `ledger.csv`, `ledger.jsonl`, `coil_map.png`, `scores.png`, `close_ups/`, `report.html`,
    `summary.json`.

    The same call again goes on after an interruption; a finished inspection is only read.

    Args:
      detector: as `runs.Run.detector` has it.
      source: an image, a video (one endless strip), a folder of images, or a JSON file of cameras: a list of objects with
        `name`, `source` (relative to the file), and optionally `side`, `across_mm`, `mm_per_px`.
      calibrate_on: folder of good images; those of one of its subfolders, at any depth, come from one strip. "": no promise,
        the run's own threshold.
      watch_idle_s: None: what is there is inspected. Else `source` is a folder that a camera writes to and is followed until
        SIGINT, SIGTERM, or, above 0, so many seconds without a new image; see `_follow`.

    Returns:
      What `summary.json` holds.

    Raises:
      InputError: a model, source or calibration that cannot be used, too few good images, an `out` of other settings.
    """
    watched = watch_idle_s is not None
    if watched and not os.path.isdir(source):
        raise InputError(f"--watch follows a folder that a camera writes to, and {source} is none: leave it out")
    check_tile(config, detector)
    cameras = sources.cameras(Path(source), config.mm_per_px or None)
    check_out(out, [calibrate_on, *(where for _, where in cameras)])
    if watched:
        # Stands for what is to come.
        strips = [Strip(cameras[0][0], "" if config.strip else source, ())]
    else:
        strips = [s for camera, where in cameras for s in sources.strips_of(where, camera, config.strip)]
    _check_flags(config, strips, calibrate_on)
    good = good_tiles.good_images(calibrate_on) if calibrate_on else []
    settings = {
        **dataclasses.asdict(config),
        "model": detector.origin,
        "model_sha256": detector.sha256,
        "source": source,
        # Of a watched folder those that were inspected are in the journal.
        "source_files": "watched" if watched else sources.stamp(strips, Path(source)),
        "calibration": calibrate_on,
        "calibration_files": sources.digest([[os.path.relpath(p, calibrate_on), folders.fingerprint(p)] for p in good]),
        "calibration_strips": bool(good) and sources.endless(strips),
        "drift": ["score", *drift.LOOKS, *drift.PITCHES],
        "training_finished": detector.finished,
        **({} if good else {"training_threshold": detector.threshold}),
    }
    claimed = out / "inspection.json"
    if claimed.exists() and (other := configs.difference(settings, files.read_json(claimed, dict))):
        raise InputError(f"{out} holds another inspection, which differs in {other}: use a new --out")
    if (out / "summary.json").exists() and not watched:
        return _finished(out / "summary.json")
    for s in strips if good and not watched else ():
        if s.single:
            try:
                shape = folders.image_shape(s.paths[0])
            except InputError:  # it is named in its turn
                continue
            _check_size(s.paths[0], shape, config.tile_px)
    view = View(detector, config)
    limit = good_tiles.limit(config, detector, view, good, calibrate_on, settings, out)
    # Not before the calibration, so that after a refusal another rate may be asked for in the same place.
    files.write_json(claimed, settings)
    if watch_idle_s is not None:
        return _follow(config, view, Path(source), cameras[0][0], limit, settings, watch_idle_s, out)
    start = time.perf_counter()
    found = _inspect(view, strips, limit, out)
    if not found.scores:
        # Nothing to keep: once the file is mended, it is another one.
        for name in ("journal.jsonl", "inspection.json"):
            (out / name).unlink(missing_ok=True)
        raise InputError(
            found.unread[0] if found.unread else f"{source} shows nothing: name another --source", status=1
        )
    return _write(config, strips, found, limit, settings, time.perf_counter() - start, out)


def check_tile(config: configs.Inspection, detector: Fitted) -> None:
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

    def copy(self) -> "_Found":
        return dataclasses.replace(
            self,
            rows=[*self.rows],
            scores=self.scores[:],
            sizes={**self.sizes},
            close_ups={**self.close_ups},
            worst=[*self.worst],
            unread=[*self.unread],
            drawn={name: [*values] for name, values in self.drawn.items()},
        )

    def wants(self, peak: float) -> bool:
        return len(self.worst) < _WORST or peak > self.worst[0][0]

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a line of the journal."""
        self.scores.extend(record["scores"])
        for name, value in record.get("drawn", {}).items():
            self.drawn.setdefault(name, []).append(np.nan if value is None else value)
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
    """One line a band: what was found in it, and all it takes to go on after it. Each ends with a checksum of all up to it."""

    def __init__(self, path: Path):
        self._path = path
        self._sum = 0

    def read(self, *, finished: bool = False) -> Iterator[dict[str, Any]]:
        """The whole lines, or those of finished strips; what comes after them, cut short or changed, is removed from the file."""
        if not self._path.exists():
            return
        whole, size, total = 0, 0, 0
        held: list[dict[str, Any]] = []
        with self._path.open("rb") as file:
            for line in file:
                text, _, tail = line.rpartition(_CHECKSUM)
                total = zlib.crc32(text, total)
                if tail != b"%d}\n" % total:
                    break
                record = json.loads(line)
                held.append(record)
                size += len(line)
                if record["finished"] or not finished:
                    whole, self._sum = size, total
                    yield from held
                    held = []
        with self._path.open("r+b") as file:
            file.truncate(whole)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
          InputError: the disk is full.
        """
        text = json.dumps(record)[:-1].encode()
        total = zlib.crc32(text, self._sum)
        try:
            with self._path.open("ab") as file:
                file.write(text + _CHECKSUM + b"%d}\n" % total)
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written ({error.strerror}): free some space, then run again to go on", status=1
            ) from None
        self._sum = total


def _finished(path: Path) -> dict[str, Any]:
    """The summary of a finished inspection.

    Raises:
      InputError: damaged.
    """
    found = files.read_json(path, dict)
    with files.understood(path, "delete it and run again"):
        _facts(found)
        if not all(isinstance(found[k], int) for k in ("defects", "tiles", "tiles_with_an_alarm")):
            raise TypeError("a number is none")
        " ".join(found["unread"])
    return found


class _Course:
    """An inspection under way: what has been found, what the last band left open, and the journal of both.

    Attributes:
      strips: those that have begun, and any that are known to come.
      at, done: the strip under way and how many of its bands are done; 0 where the next one is to begin.
      unread: sentences about strips that could not be read (to the end), until they are noted.
      files: what the next line of the journal says of new files.
    """

    def __init__(self, view: View, strips: list[Strip], limit: Limit, journal: _Journal | None, *, tell: bool = False):
        self.view, self.strips, self.limit, self.tell = view, strips, limit, tell
        self.found, self._journal = _Found(), journal
        self.at, self.done, self._size = -1, 0, [0, 0]
        self._pending, self._crops = ledger.nothing(0), dict[tuple[int, int], str]()
        self.unread: dict[int, str] = {}
        self.files: list[Any] = []
        self._warned: set[str] = set()

    def resume(self, *, finished: bool = False) -> list[Any]:
        """Takes in the journal, or its lines of finished strips; returns all its files."""
        record: dict[str, Any] | None = None
        known = []
        for record in self._journal.read(finished=finished) if self._journal else ():
            self.found.add(record)
            known += record.get("files", [])
        if record is not None:
            self.at = record["strip"]
            if not record["finished"]:
                self.done, self._size = record["bands"], record["size"]
                self._pending, self._crops = _opened_again(record)
        if self.limit.good:
            self._warned = {one.quantity for one in drift.history(self.found.drawn, self.limit.good)}
        return known

    def fork(self, *, tell: bool) -> "_Course":
        """The same, to be ended without a word in the journal while this one goes on."""
        other = copy.copy(self)
        other.found, other._journal, other.tell = self.found.copy(), None, tell
        other._crops, other._warned, other.files = {**self._crops}, {*self._warned}, []
        return other

    def feed(self, bands: Iterable[tuple[int, Band]]) -> None:
        """Inspects the bands that follow, (strip, band)."""
        view, limit, found = self.view, self.limit, self.found
        for strip, band, opened in view.maps(bands):
            if strip != self.at:
                self.finish(strip)
                self.at, self.done, self._pending, self._crops = strip, 0, ledger.nothing(opened.shape[1]), {}
            if limit.scores.size:
                _check_size(self.strips[strip].paths[0], (band.offset + band.height, opened.shape[1]), view.tile)
            closed, self._pending = ledger.advance(self._pending, opened, limit.threshold, top=band.top)
            # Who is not among the worst now will not be later.
            wanted = [r for r in (*closed, *self._pending.regions) if found.wants(r.peak)]
            self._crops = _crops(self._crops, band, wanted)
            found.inspected_now += opened.size
            self.done, self._size = self.done + 1, [band.top + band.height, opened.shape[1]]
            scores = tiles.maxima(opened, view.tile).tolist()
            every = self.done == 1 or not self.strips[strip].single
            drawn = _drawn(view.whole(band), scores, limit, strip, self.done) if every else {}
            left = {(r.peak_y, r.peak_x) for r in self._pending.regions}
            state = {"bands": self.done, "size": self._size, "open": _to_json(self._pending, self._crops)}
            self._note(strip, closed, self._crops, scores=scores, drawn=drawn, **state)
            for one in drift.moved(found.drawn, limit.good) if drawn and limit.good else ():
                if one.quantity not in self._warned:
                    print(f"warning: {one}", flush=True)
                    self._warned.add(one.quantity)
            self._crops = {key: crop for key, crop in self._crops.items() if key in left}

    def finish(self, following: int) -> None:
        """Closes the strip that is under way, and those up to the following one of which nothing could be read."""
        if self.done:
            unread = self.unread.get(self.at)
            self._note(self.at, self._pending.regions, self._crops, finished=True, size=self._size, unread=unread)
        for i in range(self.at + 1, following):
            self._note(i, (), {}, finished=True, size=[0, 0], unread=self.unread.get(i))
        self.at, self.done = max(self.at, following - 1), 0

    def _note(
        self, strip: int, regions: Sequence[ledger.Region], crops: dict[tuple[int, int], str], **state: Any
    ) -> None:
        source, scores = self.strips[strip], self.limit.scores
        p = calibration.p_values([r.peak for r in regions], scores).tolist()
        rows = [
            ledger.row(r, source.camera, image=source.image, p_value=value if scores.size else None)
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
            **({"files": self.files} if self.files else {}),
            **state,
        }
        if self._journal:
            self._journal.write(line)
        self.found.add(line)
        self.files = []
        if rows and self.tell:
            worst = max(rows, key=lambda r: r["peak"])
            place = f"{worst['along_px']:.0f} px along, {worst['across_px']:.0f} px across"
            print(f"{source.image or 'strip'}: defects: {len(rows)}, peak {worst['peak']:.3g} at {place}", flush=True)


def _inspect(view: View, strips: list[Strip], limit: Limit, out: Path) -> _Found:
    course = _Course(view, strips, limit, _Journal(out / "journal.jsonl"))
    course.resume()
    first, skip = (course.at, course.done) if course.done else (course.at + 1, 0)
    frames = sum(max(1, video.length(p)) if sources.is_video(p) else 1 for s in strips for p in s.paths)
    with progress("inspect", frames, "frames") as update:
        bands = sources.bands(strips, view, update, first=first, skip=skip, unread=course.unread)
        course.feed(sources.ahead(bands))
    course.finish(len(strips))
    return course.found


def _follow(
    config: configs.Inspection,
    view: View,
    source: Path,
    camera: Camera,
    limit: Limit,
    settings: dict[str, Any],
    idle_s: float,
    out: Path,
) -> dict[str, Any]:
    """Inspects the images that are and come in a folder, until a signal or `idle_s` seconds without a new one (0: never).

    An image is inspected once, when it is whole (`watch.Folder`), and noted in the journal with its size and time; a plate that
    was interrupted begins again, a strip goes on after its last band. What only an end can tell, the regions that touch the last
    row and the rows below the last whole window, is in the report but not in the journal: it is told anew when more has come.
    So the ledger is that of one inspection of the same images, as if none had been there before. Images of a strip that come
    out of order, or that cannot be read, are named and left out.

    Raises:
      InputError: none of the images could be inspected, or images of a strip that must go on from are gone.
    """
    one = config.strip
    strips: list[Strip] = []
    course = _Course(view, strips, limit, _Journal(out / "journal.jsonl"), tell=True)
    known = course.resume(finished=not one)
    folder = watch.Folder(source, {name: (size, time_ns) for name, size, time_ns, _ in known})
    last = source / known[-1][0] if known else None
    for name, *_, rows in known[: 1 if one else None]:
        strips.append(Strip(camera, "" if one else name, (source / name,), rows))
    cutter = _cut_before(view, folder, source, known, course.done) if one else Cutter(view.tile, view.halo)
    inspected, seconds = len(known), 0.0
    written: Any = (0, ())
    pause, told = 0.0, time.monotonic()

    def check(path: Path, image: np.ndarray) -> None:
        if limit.scores.size and not one:
            _check_size(path, image.shape, view.tile)
        if not one:
            view.check(image.shape)
        elif last is not None:
            if path.name < last.name:
                raise InputError(
                    f"{path} came after {last.name} was inspected, but its name sorts before it: it is left out of the strip"
                )
            sources.check_order([last, path], source)
            sources.check_width(path, image.shape[1], cutter.kept.shape[1])

    def report(*, ended: bool) -> dict[str, Any]:
        so_far = course.fork(tell=ended)
        if ended and one:
            so_far.feed((0, band) for band in cutter.end())
        so_far.finish(len(strips))
        late = [f"{source / n} was written again after it was inspected" for n in (folder.rewritten() if ended else ())]
        so_far.found.unread += [*(folder.refused[name] for name in sorted(folder.refused)), *late]
        if not so_far.found.scores:
            return {}
        watched = {"images": inspected, "ended": ended, "waiting": folder.waiting()}
        return _write(config, strips, so_far.found, limit, settings, seconds, out, watched)

    print(f"watch: following {source}, {inspected} images inspected before", file=sys.stderr, flush=True)
    with watch.until_signal() as stopped:
        if one and not known:
            sources.check_order(sorted(source / name for name in folders.image_names(source)), source)
        while not stopped():
            begun = time.monotonic()
            ready = folder.look(in_order=one)
            again = time.monotonic() + max(_POLL_S, 20 * (time.monotonic() - begun))
            for path in ready:
                if stopped() or time.monotonic() > again:
                    break
                begun = time.monotonic()
                try:
                    if (image := folder.read(path)) is None:
                        if one:
                            break
                        continue
                    check(path, image)
                except InputError as error:
                    folder.refused[path.name] = str(error)
                    print(f"warning: {error}", flush=True)
                    continue
                course.files.append([path.name, *folder.stamp(path), len(image)])
                if one:
                    strips[:] = strips or [Strip(camera, "", (path,), len(image))]
                    course.feed((0, band) for band in cutter.push(image))
                else:
                    strips.append(Strip(camera, path.name, (path,), len(image)))
                    course.feed(
                        (len(strips) - 1, band) for band in tiles.bands([image], tile=view.tile, halo=view.halo)
                    )
                    course.finish(len(strips))
                folder.take(path)
                last, inspected = path, inspected + 1
                seconds += time.monotonic() - begun
            idle = time.monotonic() - folder.news
            state = (inspected, tuple(folder.refused))
            if not (ready or folder.waiting()) and 0 < idle_s <= idle:
                break
            if state != written and time.monotonic() - told >= (_REFRESH_BUSY_S if ready else pause):
                begun = time.monotonic()
                report(ended=False)
                written, told = state, time.monotonic()
                pause = max(_REFRESH_S, 10 * (told - begun))
                defects = f"{len(course.found.rows)} defects"
                print(f"watch: {inspected} images inspected, {defects} so far", file=sys.stderr, flush=True)
            if not ready:
                time.sleep(max(0.0, again - time.monotonic()))
        folder.look(in_order=one)
        found = report(ended=True)
    if not found:
        raise InputError(next(iter(folder.refused.values()), f"{source} has had no image to inspect"), status=1)
    return found


def _cut_before(view: View, folder: watch.Folder, source: Path, known: Sequence[Any], done: int) -> Cutter:
    """The strip's rows that bands from `done` on take, from the files that hold them.

    Raises:
      InputError: one of those is gone or was changed.
    """
    cutter = Cutter(view.tile, view.halo, done * view.tile)
    ends = np.cumsum([0, *(rows for *_, rows in known)])
    first = int(np.searchsorted(ends, cutter.needed(cutter.top), side="right")) - 1
    images = []
    for name, *stamp, _ in known[first:]:
        if watch.stamp_of(source / name) != tuple(stamp):
            raise InputError(
                f"{source / name} is gone or was changed, and the strip does not go on without its last images: restore it or use a new "
                "--out"
            )
        images.append(folders.read_image(source / name))
    if images:
        cutter.first, cutter.kept = int(ends[first]), np.concatenate(images)
    return cutter


def _drawn(whole: np.ndarray, scores: Sequence[float], limit: Limit, strip: int, band: int) -> dict[str, float | None]:
    """What drift compares of one random tile of a band `[n, tile, tile]`; nothing of a band without a whole one."""
    if not len(whole) or not limit.good:
        return {}
    k = int(np.random.default_rng([strip, band, 0xD4]).integers(len(whole)))
    found = drift.measure(whole[k : k + 1], limit.lattice)
    return {"score": scores[k]} | {name: None if np.isnan(v[0]) else float(v[0]) for name, v in found.items()}


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
    watched: dict[str, Any] | None = None,
) -> dict[str, Any]:
    from steel_ad.report import coils, evaluation
    from steel_ad.report import inspection_page as page

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
        **({"watched": watched} if watched else {}),
        "settings": settings,
        "versions": versions(),
    }
    columns = list(rows[0]) if rows else ["defect", *ledger.COLUMNS]
    files.write_csv(out / "ledger.csv", rows, columns)
    files.write_text(out / "ledger.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for defect, png in close_ups.items():
        files.write_bytes(out / "close_ups" / f"{defect:06d}.png", png)
    for old in (out / "close_ups").glob("*.png") if watched else ():
        # Numbers change as rows come.
        if int(old.stem) not in close_ups:
            old.unlink()
    # A name that is not UTF-8 cannot be drawn.
    name = Path(settings["source"]).name.encode("utf-8", "backslashreplace").decode()
    counted = f"{len(rows)} defect{'s' * (len(rows) != 1)}"
    sides, unit = outcome.coil(strips, found.sizes, rows, rolls)
    coil = coils.coil_map(out / "coil_map.png", sides, unit=unit, title=f"{name}: {counted}")
    histogram = evaluation.score_histogram(
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
    if watched := summary.get("watched"):
        state = "ended" if watched["ended"] else "still going on when this was written"
        waiting = f"; not inspected yet: {', '.join(watched['waiting'])}" if watched["waiting"] else ""
        facts.append(("watched", f"{watched['images']} images, {state}{waiting}"))
    if not summary["settings"]["training_finished"]:
        facts.append(("training", "The model's training run is not finished: this is its newest checkpoint."))
    facts += [(f"recurrence, {r['side']}", r["sentence"]) for r in summary["recurrence"]]
    facts += [("drift", sentence) for sentence in summary["drift"] or ()]
    speed = summary["megapixels_per_second"]
    if speed is not None:
        facts.append(("inspected", f"{summary['megapixels']:.2f} Mpx, {speed:.2f} Mpx/s"))
    return [*facts, ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))]
