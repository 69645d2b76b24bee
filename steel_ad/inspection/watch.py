"""A folder that a camera writes to: which of its images are new and whole, and when a signal ends the watch."""

import contextlib
import dataclasses
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from steel_ad.data import folders
from steel_ad.errors import InputError

# A readable file whose size and time have stayed the same for so long is whole.
SETTLED_S = 1.0
# A file that cannot be read has so long to become whole.
GIVEN_UP_S = 10.0

Stamp = tuple[int, int]  # size in bytes, time in ns


@dataclasses.dataclass
class _Waiting:
    """A file that has not been taken.

    Attributes:
      since: when its stamp was first seen, by `time.monotonic`.
      unreadable: whether reading it has failed.
    """

    stamp: Stamp
    since: float
    unreadable: bool = False


class Folder:
    """The images that come into a folder; each is offered once, when it is whole.

    Attributes:
      taken: stamp of each image that has been inspected, by name.
      refused: a sentence about each image that is there but cannot be inspected, by name; after it is rewritten, it is offered again.
      news: when an image last came, grew or was inspected, by `time.monotonic`.
    """

    def __init__(self, path: Path, taken: dict[str, Stamp]):
        self._path, self.taken = path, taken
        self.refused: dict[str, str] = {}
        self.news = time.monotonic()
        self._waiting: dict[str, _Waiting] = {}

    def look(self, *, in_order: bool) -> list[Path]:
        """The images that are whole and new, in plain order.

        A file is whole when its size and time have stayed the same for `SETTLED_S`, or when its time is `GIVEN_UP_S` ago.

        Args:
          in_order: images that follow one that is not whole yet wait for it.

        Raises:
          InputError: the folder cannot be read.
        """
        now, clock = time.monotonic(), time.time()
        waiting = {}
        for name in folders.image_names(self._path):
            if name in self.taken or (stamp := stamp_of(self._path / name)) is None:
                continue
            known = self._waiting.get(name)
            if known is None or known.stamp != stamp:
                self.refused.pop(name, None)
                self.news = now
                # A file that is old at the start is whole.
                known = _Waiting(stamp, now if clock - stamp[1] / 1e9 < GIVEN_UP_S else now - GIVEN_UP_S)
            waiting[name] = known
        self._waiting = waiting
        self.refused = {name: sentence for name, sentence in self.refused.items() if name in waiting}
        found = []
        for name in sorted(set(waiting) - set(self.refused)):
            if now - waiting[name].since >= (GIVEN_UP_S if waiting[name].unreadable else SETTLED_S):
                found.append(self._path / name)
            elif in_order:
                break
        return found

    def read(self, path: Path) -> np.ndarray | None:
        """An image that `look` has found, uint8 `[h, w]`; None where it is not whole after all and will be offered again.

        Raises:
          InputError: it cannot be read.
        """
        known = self._waiting[path.name]
        try:
            folders.stay_inside(path, os.path.realpath(self._path))
            image = folders.read_image(path)
        except InputError:
            known.unreadable = True
            if stamp_of(path) == known.stamp and time.monotonic() - known.since >= GIVEN_UP_S:
                raise
            return None
        return image if stamp_of(path) == known.stamp else None

    def take(self, path: Path) -> None:
        """Notes that an image has been inspected."""
        self.taken[path.name] = self._waiting.pop(path.name).stamp
        self.news = time.monotonic()

    def stamp(self, path: Path) -> Stamp:
        """The stamp of an image that `look` has found, as it was then."""
        return self._waiting[path.name].stamp

    def waiting(self) -> list[str]:
        """Names of images that are there and neither inspected nor refused."""
        return sorted(set(self._waiting) - set(self.refused))

    def rewritten(self) -> list[str]:
        """Names of inspected images that were changed since."""
        return [name for name, stamp in self.taken.items() if stamp_of(self._path / name) not in (None, stamp)]


def stamp_of(path: Path) -> Stamp | None:
    """Size and time of a file; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


@contextlib.contextmanager
def until_signal() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGINT or SIGTERM has come. The first one interrupts nothing; a second one acts as usual."""
    came: list[int] = []
    before: dict[int, object] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())  # type: ignore[arg-type]

    def note(number: int, _) -> None:
        came.append(number)
        restore()

    # Python delivers signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield lambda: bool(came)
    finally:
        restore()
