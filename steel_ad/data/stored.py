"""Images that stay in their files, for sets that do not fit the device: worker processes read them and cut the patches.

The only module that knows grain.
"""

import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
from absl import flags

from steel_ad.data import folders
from steel_ad.errors import InputError
from steel_ad.progress import progress

# Files looked at between two looks at their size, or two lines of progress.
_AT_ONCE = 1000
# Patches whose places are drawn ahead and handed to the workers, which then start anew: 12 MiB.
_PLACES = 2**20
# Batches that each worker keeps ready.
_READY = 4
# Python's tracker of semaphores is started with these options: what a run leaves that ends at once, it clears away silently.
_QUIET = "ignore:resource_tracker:UserWarning"


class Stored(Sequence[np.ndarray]):
    """Images uint8 `[h_i, w_i]` that are read whenever they are asked for; `paths`, and `sizes` int32 `[n, 2]`, height and width."""

    def __init__(self, paths: Sequence[Path], sizes: np.ndarray):
        self.paths, self.sizes = paths, sizes

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return type(self)(self.paths[index], self.sizes[index])
        return self._read(self.paths[index], tuple(self.sizes[index].tolist()))

    def _read(self, path: Path, shape: tuple[int, int]) -> np.ndarray:
        image = folders.read_image(path)
        if image.shape != shape:
            raise InputError(f"{path} has changed since this run began: restore it, then run again")
        return image

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> "Stored":
        """The images of these indices."""
        return type(self)([self.paths[i] for i in indices], self.sizes[indices])


class Masks(Stored):
    """Masks uint8 `[h_i, w_i]`, 0 and 1, read as `Stored` images are; `sizes` are their images'."""

    def _read(self, path: Path, shape: tuple[int, int]) -> np.ndarray:
        return folders.read_mask(path, shape).astype(np.uint8)


class Joined(Sequence[np.ndarray]):
    """The images of several `sets` one after the other, which stay where they are; `starts`: index of each set's first."""

    def __init__(self, sets: Sequence[Sequence[np.ndarray]]):
        self.sets = sets
        self.starts = np.cumsum([0, *map(len, sets)])

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        of = int(np.searchsorted(self.starts, index, side="right")) - 1
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sets[of][index - self.starts[of]]

    def __len__(self) -> int:
        return int(self.starts[-1])


def read(paths: Sequence[Path], *, min_size: int, resident: float) -> list[np.ndarray] | Stored:
    """The images as `folders.read_images` reads them, or `Stored` ones where they have more than `resident` bytes.

    Raises:
      InputError: as `folders.read_images`; of stored images not what only decoding would show.
    """

    def look(path: Path) -> tuple[int, int]:
        shape = folders.image_shape(path)
        if min(shape) < min_size:
            folders.read_images([path], min_size=min_size)  # which refuses it
        return shape

    def size() -> int:
        return sum(h * w for h, w in seen)

    seen: list[tuple[int, int]] = []
    with ThreadPoolExecutor() as pool:
        while len(seen) < len(paths) and size() <= resident < math.inf:
            seen += pool.map(look, paths[len(seen) : len(seen) + _AT_ONCE])
        if not paths or size() <= resident:
            return folders.read_images(paths, min_size=min_size)
        with progress("check", len(paths), "images", done=len(seen)) as update:
            while len(seen) < len(paths):
                seen += pool.map(look, paths[len(seen) : len(seen) + _AT_ONCE])
                update(len(seen))
    return Stored(paths, np.array(seen, np.int32))


def shapes(images: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """Of each image (h, w), without reading any."""
    if isinstance(images, Stored):
        return [(h, w) for h, w in images.sizes.tolist()]
    if isinstance(images, Joined):
        return [shape for part in images.sets for shape in shapes(part)]
    return [image.shape for image in images]


class _Cutter:
    """Places int32 `[..., 3]` (image, top, left) to the patches there, uint8 `[..., patch_size, patch_size]`; of an image below 0
    zeros."""

    def __init__(self, images: Stored | Joined, patch_size: int):
        self._images, self._side = images, patch_size

    def __call__(self, places: np.ndarray) -> np.ndarray:
        patches = np.zeros((*places.shape[:-1], self._side, self._side), np.uint8)
        for index in np.ndindex(*places.shape[:-1]):
            image, top, left = places[index].tolist()
            if image >= 0:
                patches[index] = self._images[image][top : top + self._side, left : left + self._side]
        return patches


def batches(
    images: Stored | Joined,
    places: Callable[[int, int], np.ndarray],
    *,
    first: int,
    total: int,
    size: int,
    patch_size: int,
) -> Generator[np.ndarray]:
    """Batches of patches, number `first` to `total` - 1: uint8 `[..., patch_size, patch_size]`, read ahead by worker processes.

    Which they are depends on their number alone, so that nothing but it is needed to go on.

    Args:
      places: (number of a batch, count) -> the places of so many batches, int32 `[count, ..., 3]`: image, top, left; image -1
        for a patch of zeros that nobody looks at.
      size: patches in a batch.

    Raises:
      InputError: a file that cannot be read, or has another size than at the start; a worker that has been killed.
    """
    import grain

    if not flags.FLAGS.is_parsed():  # grain has flags of its own and reads them also where no binary has parsed any
        flags.FLAGS.mark_as_parsed()
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)
    cutter = _Cutter(images, patch_size)
    # Batches come through pipes: shared memory is scarce in containers, and stays behind where a run is killed.
    options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    while first < total:
        count = min(max(1, _PLACES // size), total - first)
        chosen: Any = grain.MapDataset.source(places(first, count)).map(cutter)
        chosen = grain.experimental.WithOptionsIterDataset(
            chosen.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READY)), options
        )
        processes = grain.MultiprocessingOptions(num_workers=min(_workers(), count), per_worker_buffer_size=_READY)
        ready = iter(chosen.mp_prefetch(processes, _begin))
        try:
            yield from itertools.islice(ready, count)
        except RuntimeError as error:  # grain's, of a process that is gone
            raise InputError(
                "a process that reads images has been ended, perhaps for want of memory: run again to go on from the last "
                f"checkpoint ({error})",
                status=1,
            ) from error
        finally:
            ready.close()
        first += count


def _workers() -> int:
    """Processes that read: one for two cores, since each takes 250 MB."""
    return min(max(1, (os.cpu_count() or 2) // 2), 16)


def _begin(*_) -> None:
    """In a worker: it says nothing when the run is interrupted, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
