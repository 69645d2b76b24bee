"""A sequence of images, each in memory or made when it is asked for: read from its file, or drawn."""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from steel_ad.data import folders
from steel_ad.errors import InputError
from steel_ad.progress import progress

# Files looked at between two looks at their size, or two lines of progress.
_AT_ONCE = 1000


class Later(NamedTuple):
    """An image uint8 of `shape` (h, w) that `make` reads or draws, again whenever it is asked for."""

    shape: tuple[int, int]
    make: Callable[[], np.ndarray]


def made(item: np.ndarray | Later) -> np.ndarray:
    """The image itself."""
    return item.make() if isinstance(item, Later) else item


class Images(Sequence[np.ndarray]):
    """Images uint8 `[h_i, w_i]` of several `parts`, one part after the other; joining them reads none.

    Attributes:
      items: of each image, itself or how it is made.
    """

    def __init__(self, *parts: "Sequence[np.ndarray | Later] | Images"):
        self.items: list[np.ndarray | Later] = []
        for part in parts:
            self.items += part.items if isinstance(part, Images) else part

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int32 `[n, 2]`; none is read."""
        return np.array([item.shape for item in self.items], np.int32).reshape(-1, 2)

    @property
    def num_pixels(self) -> int:
        """Of all images together."""
        return int(self.sizes.prod(axis=1, dtype=np.int64).sum())

    @property
    def stored(self) -> bool:
        """Whether some image is not in memory."""
        return any(isinstance(item, Later) for item in self.items)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index):
        return Images(self.items[index]) if isinstance(index, slice) else made(self.items[index])

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: np.ndarray) -> "Images":
        """The images of these indices; none is read."""
        return Images([self.items[i] for i in indices])


def read(paths: Sequence[Path], *, min_size: int, resident: float) -> Images:
    """Images as `folders.read_images` reads them, kept in memory unless they have more than `resident` bytes.

    Raises:
      InputError: as `folders.read_images`; of images that stay in their files, not what only decoding would show.
    """

    def look(path: Path) -> Later:
        shape = folders.image_shape(path)
        if min(shape) < min_size:
            folders.read_images([path], min_size=min_size)  # which refuses it
        return Later(shape, functools.partial(_read, path, shape))

    items: list[Later] = []
    with ThreadPoolExecutor() as pool:
        while len(items) < len(paths) and Images(items).num_pixels <= resident < math.inf:
            items += pool.map(look, paths[len(items) : len(items) + _AT_ONCE])
        if not paths or Images(items).num_pixels <= resident:
            return Images(folders.read_images(paths, min_size=min_size))
        with progress("check", len(paths), "images", done=len(items)) as update:
            while len(items) < len(paths):
                items += pool.map(look, paths[len(items) : len(items) + _AT_ONCE])
                update(len(items))
    return Images(items)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray:
    image = folders.read_image(path)
    if image.shape != shape:
        raise InputError(f"{path} has changed since this run began: restore it, then run again")
    return image


def read_mask(path: Path, shape: tuple[int, int], unmarked: str) -> np.ndarray:
    """The mask of a defective image of `shape` (h, w): uint8 `[h, w]`, 0 and 1.

    Raises:
      InputError: as `folders.read_mask`; a mask that marks nothing, in the words `unmarked`.
    """
    mask = folders.read_mask(path, shape)
    if not mask.any():
        raise InputError(f"{path} {unmarked}")
    return mask.astype(np.uint8)
