"""An inspection of a watched folder: images are inspected as a camera writes them, and the report is kept up to date.

An image is inspected once, when it is whole (`watch.Folder`), and noted in the journal with its size and time. After an
interruption a plate begins again, and a strip goes on after its last band. The regions that touch a strip's last row, and the rows
below its last whole window, are known only where the strip ends: they are in every report but not in the journal, and are
computed anew when more has come. So the ledger is that of one inspection of the same images. An image of a strip that comes
out of order, or an image that cannot be read, is named and left out.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad.data import folders
from steel_ad.errors import InputError
from steel_ad.inspection import outcome, strips, tiles, watch
from steel_ad.inspection.course import Course, Findings
from steel_ad.inspection.good_tiles import Reference
from steel_ad.inspection.journal import Journal
from steel_ad.inspection.ledger import Camera
from steel_ad.inspection.strips import Strip
from steel_ad.inspection.tiles import Cutter
from steel_ad.inspection.view import View

# Pauses between two looks at the folder, and between two reports: where nothing is left to inspect, and where there is.
POLL_S = 0.5
REFRESH_S, REFRESH_BUSY_S = 5.0, 60.0


def follow(
    config: configs.Inspection,
    view: View,
    source: Path,
    camera: Camera,
    reference: Reference,
    settings: dict[str, Any],
    idle_s: float,
    out: Path,
) -> dict[str, Any]:
    """Inspects the images that are in a folder and that come into it, and keeps the report up to date.

    Args:
      source: the folder.
      settings: of the report.
      idle_s: the inspection ends after so many seconds without a new image (0: never), or at SIGINT or SIGTERM.

    Returns:
      What `summary.json` holds.

    Raises:
      InputError: no image could be inspected, or images that a strip must go on from are gone.
    """
    followed = _Followed(config.strip, view, source, camera, reference, out)
    folder = followed.folder
    written: Any = (0, ())
    pause, told = 0.0, time.monotonic()

    def report(*, ended: bool) -> dict[str, Any]:
        findings = followed.so_far(ended=ended)
        if not findings.scores:
            return {}
        watched = {"images": followed.inspected, "ended": ended, "waiting": folder.waiting()}
        return outcome.write(
            config, followed.strips, findings, reference, settings, followed.seconds, out, watched=watched
        )

    print(f"watch: following {source}, {followed.inspected} images inspected before", file=sys.stderr, flush=True)
    with watch.until_signal() as stopped:
        while not stopped():
            begun = time.monotonic()
            ready = folder.look(in_order=config.strip)
            again = time.monotonic() + max(POLL_S, 20 * (time.monotonic() - begun))
            for path in ready:
                if stopped() or time.monotonic() > again or not followed.take(path):
                    break
            idle = time.monotonic() - folder.news
            if not (ready or folder.waiting()) and 0 < idle_s <= idle:
                break
            state = (followed.inspected, tuple(folder.refused))
            if state != written and time.monotonic() - told >= (REFRESH_BUSY_S if ready else pause):
                begun = time.monotonic()
                report(ended=False)
                written, told = state, time.monotonic()
                # Reports take at most a tenth of the time.
                pause = max(REFRESH_S, 10 * (told - begun))
                defects = f"{len(followed.course.findings.rows)} defects"
                print(f"watch: {followed.inspected} images inspected, {defects} so far", file=sys.stderr, flush=True)
            if not ready:
                time.sleep(max(0.0, again - time.monotonic()))
        folder.look(in_order=config.strip)
        summary = report(ended=True)
    if not summary:
        raise InputError(next(iter(folder.refused.values()), f"{source} has had no image to inspect"), status=1)
    return summary


class _Followed:
    """The inspection of a folder's images, as plates or as one strip.

    Attributes:
      folder: the images that are there.
      strips: the plates that are inspected, or the one strip.
      course: their inspection.
      inspected: number of images, those of earlier starts included.
      seconds: that inspecting has taken since this start.
    """

    def __init__(self, one_strip: bool, view: View, source: Path, camera: Camera, reference: Reference, out: Path):
        self._one, self._view, self._source, self._camera, self._reference = one_strip, view, source, camera, reference
        self.strips: list[Strip] = []
        self.course = Course(view, self.strips, reference, Journal(out / "journal.jsonl"), tell=True)
        known = self.course.resume(finished=not one_strip)
        self.folder = watch.Folder(source, {name: (size, time_ns) for name, size, time_ns, _ in known})
        self.inspected, self.seconds = len(known), 0.0
        self._last = source / known[-1][0] if known else None
        for name, *_, rows in known[: 1 if one_strip else None]:
            self.strips.append(Strip(camera, "" if one_strip else name, (source / name,), rows))
        self._cutter = _restored(view, source, known, self.course.done) if one_strip else Cutter(view.tile, view.halo)
        if one_strip and not known:
            strips.check_order(sorted(source / name for name in folders.image_names(source)), source)

    def take(self, path: Path) -> bool:
        """Inspects an image that `folder.look` has found, or names it where that cannot be; False: a strip must wait for it."""
        begun = time.monotonic()
        try:
            image = self.folder.read(path)
            if image is None:
                return not self._one
            self._check(path, image)
        except InputError as error:
            self.folder.refused[path.name] = str(error)
            print(f"warning: {error}", flush=True)
            return True
        self.course.files.append([path.name, *self.folder.stamp(path), len(image)])
        if self._one:
            if not self.strips:
                self.strips.append(Strip(self._camera, "", (path,), len(image)))
            self.course.feed((0, band) for band in self._cutter.push(image))
        else:
            plate = len(self.strips)
            self.strips.append(Strip(self._camera, path.name, (path,), len(image)))
            bands = tiles.bands([image], tile=self._view.tile, halo=self._view.halo)
            self.course.feed((plate, band) for band in bands)
            self.course.finish(plate + 1)
        self.folder.take(path)
        self._last, self.inspected = path, self.inspected + 1
        self.seconds += time.monotonic() - begun
        return True

    def _check(self, path: Path, image: np.ndarray) -> None:
        """Raises InputError for an image that cannot be a plate or go on with the strip."""
        if not self._one:
            if self._reference.scores.size:
                strips.check_size(path, image.shape, self._view.tile)
            self._view.check(image.shape)
        elif self._last is not None:
            if path.name < self._last.name:
                raise InputError(
                    f"{path} came after {self._last.name} was inspected, but its name sorts before it: it is left out of the strip"
                )
            strips.check_order([self._last, path], self._source)
            strips.check_width(path, image.shape[1], self._cutter.kept.shape[1])

    def so_far(self, *, ended: bool) -> Findings:
        """What a report now would say, as if the strip ended here; `ended`: it does."""
        course = self.course.fork(tell=ended)
        if ended and self._one:
            course.feed((0, band) for band in self._cutter.end())
        course.finish(len(self.strips))
        refused = [self.folder.refused[name] for name in sorted(self.folder.refused)]
        rewritten = self.folder.rewritten() if ended else ()
        late = [f"{self._source / name} was written again after it was inspected" for name in rewritten]
        course.findings.unread += [*refused, *late]
        return course.findings


def _restored(view: View, source: Path, known: Sequence[Any], done: int) -> Cutter:
    """The cutter of a strip of which `done` bands are inspected, with the rows that its next bands show.

    Args:
      known: (name, size, time, rows) of the images so far.

    Raises:
      InputError: an image that holds such rows is gone or was changed.
    """
    cutter = Cutter(view.tile, view.halo, done * view.tile)
    ends = np.cumsum([0, *(rows for *_, rows in known)])
    first = int(np.searchsorted(ends, cutter.needed(cutter.top), side="right")) - 1
    images = []
    for name, *stamp, _ in known[first:]:
        if watch.stamp_of(source / name) != tuple(stamp):
            raise InputError(
                f"{source / name} is gone or was changed, and the strip does not go on without its last images: restore it or use "
                "a new --out"
            )
        images.append(folders.read_image(source / name))
    if images:
        cutter.first, cutter.kept = int(ends[first]), np.concatenate(images)
    return cutter
