"""Patches of images that stay in their files: worker processes read the images and cut.

The only module that knows grain.
"""

import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from absl import flags

from steel_ad.data.images import Images
from steel_ad.errors import InputError

# Patches whose places are drawn ahead and handed to the workers, which then start anew: 12 MiB.
_PLACES = 2**20
# Batches that each worker keeps ready.
_READY = 4
# Python's tracker of semaphores is started with these options: what a run leaves that ends at once, it clears away silently.
_QUIET = "ignore:resource_tracker:UserWarning"


def _cut(images: Images, side: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the places int32 `[..., 3]` (image, top, left) have an image, bool `[...]`, and these ones' patches, uint8
    `[n, side, side]`."""
    there = places[..., 0] >= 0
    patches = np.empty((there.sum(), side, side), np.uint8)
    for patch, (image, top, left) in zip(patches, places[there].tolist(), strict=True):
        patch[:] = images[image][top : top + side, left : left + side]
    return there, patches


def _whole(there: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Patches uint8 `[..., p, p]` of what `_cut` returns, zeros where there is none."""
    whole = np.zeros((*there.shape, *patches.shape[1:]), np.uint8)
    whole[there] = patches
    return whole


def batches(
    images: Images,
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
    cut = functools.partial(_cut, images, patch_size)
    # Batches come through pipes: shared memory is scarce in containers, and stays behind where a run is killed.
    options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    while first < total:
        count = min(max(1, _PLACES // size), total - first)
        chosen: Any = grain.MapDataset.source(places(first, count)).map(cut)
        chosen = grain.experimental.WithOptionsIterDataset(
            chosen.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READY)), options
        )
        processes = grain.MultiprocessingOptions(num_workers=min(_workers(), count), per_worker_buffer_size=_READY)
        ready = iter(chosen.mp_prefetch(processes, _begin))
        try:
            yield from itertools.starmap(_whole, itertools.islice(ready, count))
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
