"""A strip in tiles at fixed places, each with a halo of its surroundings: what a detector sees at once.

Tiles begin at the strip's first row and column, whatever pieces it is read in, and a detector sees exactly one tile and its
halo. So a map depends on nothing but the strip, and calibration and inspection look at the same unit.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """A row of tiles.

    Attributes:
      top: the strip's row that the band begins with.
      height: rows of it that are on the strip, 1..tile.
      pixels: uint8 `[tile + 2 halo, w]`, the first row being `top - halo`; beyond the strip's ends it is mirrored.
    """

    top: int
    height: int
    pixels: np.ndarray


def bands(chunks: Iterable[np.ndarray], *, tile: int, halo: int) -> Iterator[Band]:
    """The bands of a strip of any length, in memory for a chunk and a few bands.

    Args:
      chunks: uint8 `[h_i, w]`, which follow each other along the strip.
      tile: side of a tile's core, in pixels.
      halo: in pixels, on each side.

    Raises:
      ValueError: chunks of different widths, or not uint8 `[h, w]`.
    """
    kept, first, top = np.zeros((0, 0), np.uint8), 0, 0
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.ndim != 2 or (first + len(kept) and chunk.shape[1] != kept.shape[1]):
            raise ValueError(
                f"a chunk of {chunk.dtype}{list(chunk.shape)} does not follow one of width {kept.shape[1]}"
            )
        kept = np.concatenate([kept, chunk]) if len(kept) else chunk
        # One row more than the band needs says that the strip does not end with it.
        while first + len(kept) > top + tile + halo:
            rows = _mirrored(np.arange(top - halo, top + tile + halo), first + len(kept))
            yield Band(top, tile, kept[rows - first])
            top += tile
            # The last band may be mirrored from as far as that.
            gone = max(0, top - tile - 2 * halo - first)
            kept, first = kept[gone:], first + gone
    end = first + len(kept)
    while top < end:
        rows = _mirrored(np.arange(top - halo, top + tile + halo), end)
        yield Band(top, min(tile, end - top), kept[rows - first])
        top += tile


def cut(band: Band, *, tile: int, halo: int) -> np.ndarray:
    """A band's tiles with their halos, from left to right: uint8 `[n, tile + 2 halo, tile + 2 halo]`."""
    width = band.pixels.shape[1]
    starts = np.arange(0, width, tile)
    columns = _mirrored(starts[:, None] + np.arange(-halo, tile + halo)[None, :], width)
    return band.pixels[:, columns].transpose(1, 0, 2)


def join(cores: np.ndarray, band: Band) -> np.ndarray:
    """The map `[height, w]` of a band from those of its tiles, `[n, tile, tile]`."""
    n, tile, _ = cores.shape
    return cores.transpose(1, 0, 2).reshape(tile, n * tile)[: band.height, : band.pixels.shape[1]]


def maxima(joined: np.ndarray, tile: int) -> np.ndarray:
    """The greatest value of each tile of a band's map `[h, w]`: `[n]`."""
    return np.maximum.reduceat(joined.max(0), np.arange(0, joined.shape[1], tile))


def _mirrored(index: np.ndarray, length: int) -> np.ndarray:
    """Indices in 0..length-1: those beyond the ends come back, as often as it takes, without repeating the end itself."""
    if length == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * length - 2)
    return np.minimum(index, 2 * length - 2 - index)
