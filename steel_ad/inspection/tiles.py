"""A strip in tiles at fixed places, each with a halo of its surroundings: what a detector sees at once.

Tiles begin at the strip's first row and column, whatever pieces it is read in; the last one of each direction lies flush with
the end, and of its map only what the tile before does not show is taken. A detector sees exactly one tile and its halo. So a map
depends on nothing but the strip, a tile is on the strip as a whole, and calibration and inspection look at the same unit. Only a
strip smaller than a tile is mirrored into it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """A row of tiles.

    Attributes:
      top: the strip's row that the band begins with.
      height: its rows, 1..tile.
      pixels: uint8 `[tile + 2 halo, w]`; beyond the strip's ends it is mirrored.
      offset: rows of the tiles above `top`, which the band before shows: the first row of `pixels` is `top - offset - halo`.
    """

    top: int
    height: int
    pixels: np.ndarray
    offset: int = 0


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
        height = min(tile, end - top)
        offset = min(top, tile - height)
        start = top - offset
        rows = _mirrored(np.arange(start - halo, start + tile + halo), end)
        yield Band(top, height, kept[rows - first], offset)
        top += tile


def cut(band: Band, *, tile: int, halo: int) -> np.ndarray:
    """A band's tiles with their halos, from left to right: uint8 `[n, tile + 2 halo, tile + 2 halo]`."""
    width = band.pixels.shape[1]
    starts = np.minimum(np.arange(0, width, tile), max(0, width - tile))
    columns = _mirrored(starts[:, None] + np.arange(-halo, tile + halo)[None, :], width)
    return band.pixels[:, columns].transpose(1, 0, 2)


def join(cores: np.ndarray, band: Band) -> np.ndarray:
    """The map `[height, w]` of a band from those of its tiles, `[n, tile, tile]`."""
    n, tile, _ = cores.shape
    rows, last = slice(band.offset, band.offset + band.height), band.pixels.shape[1] - (n - 1) * tile
    left = tile - last if n > 1 else 0
    return np.concatenate([*cores[:-1, rows], cores[-1, rows, left : left + last]], axis=1)


def maxima(joined: np.ndarray, tile: int) -> np.ndarray:
    """The greatest value of each tile of a band's map `[h, w]`: `[n]`."""
    return np.maximum.reduceat(joined.max(0), np.arange(0, joined.shape[1], tile))


def _mirrored(index: np.ndarray, length: int) -> np.ndarray:
    """Indices in 0..length-1: those beyond the ends come back, as often as it takes, without repeating the end itself."""
    if length == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * length - 2)
    return np.minimum(index, 2 * length - 2 - index)
