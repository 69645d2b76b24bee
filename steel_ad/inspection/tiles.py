"""A strip in tiles at fixed places, each seen in a window with a halo of its surroundings: what a detector sees at once.

Tiles begin at the strip's first row and column, whatever pieces it is read in; the last one of each direction lies flush with
the end, and of its map only what the tile before does not show is taken. A window that would reach beyond an end is moved inside, so
that a detector sees nothing but the strip itself: a mirrored pattern would look like a defect. A strip smaller than a window
is one. So a map depends on nothing but the strip, and calibration and inspection look at the same unit.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """A row of tiles.

    Attributes:
      top: the strip's row that the band begins with.
      height: its rows, 1..tile.
      pixels: uint8 `[min(tile + 2 halo, h), w]` of the strip, `[h, w]`.
      offset: rows of the tiles above `top`, which the band before shows.
      core: row of `pixels` that the tiles begin with; the strip's row `top - offset`.
    """

    top: int
    height: int
    pixels: np.ndarray
    offset: int = 0
    core: int = 0


class Pieces(NamedTuple):
    """Windows uint8 `[n, h, w]`, and the corners (row, column) of their tiles, int32 `[n, 2]`."""

    pixels: np.ndarray
    corners: np.ndarray

    def tiles(self, tile: int) -> np.ndarray:
        """The tiles alone: uint8 `[n, min(tile, h), min(tile, w)]`."""
        cut = [w[y : y + tile, x : x + tile] for w, (y, x) in zip(self.pixels, self.corners, strict=True)]
        return np.stack(cut)


def bands(chunks: Iterable[np.ndarray], *, tile: int, halo: int) -> Iterator[Band]:
    """The bands of a strip of any length, in memory for a chunk and a few bands.

    Args:
      chunks: uint8 `[h_i, w]`, which follow each other along the strip.
      tile: side of a tile, in pixels.
      halo: in pixels, on each side.

    Raises:
      ValueError: chunks of different widths, or not uint8 `[h, w]`.
    """
    kept, first, top, size = np.zeros((0, 0), np.uint8), 0, 0, tile + 2 * halo
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.ndim != 2 or (first + len(kept) and chunk.shape[1] != kept.shape[1]):
            raise ValueError(
                f"a chunk of {chunk.dtype}{list(chunk.shape)} does not follow one of width {kept.shape[1]}"
            )
        kept = np.concatenate([kept, chunk]) if len(kept) else chunk
        # A whole window is where it would be on any longer strip.
        while (start := max(0, top - halo)) + size <= first + len(kept):
            yield Band(top, tile, kept[start - first :][:size], 0, top - start)
            top += tile
            # The last windows may begin so far above.
            gone = max(0, top - tile - halo - first)
            kept, first = kept[gone:], first + gone
    end = first + len(kept)
    while top < end:
        height = min(tile, end - top)
        offset = min(top, tile - height)
        start = max(0, min(top - offset - halo, end - size))
        yield Band(top, height, kept[start - first :][:size], offset, top - offset - start)
        top += tile


def cut(band: Band, *, tile: int, halo: int) -> Pieces:
    """A band's windows, from left to right."""
    width, size = band.pixels.shape[1], tile + 2 * halo
    starts = np.minimum(np.arange(0, width, tile), max(0, width - tile))
    left = np.maximum(0, np.minimum(starts - halo, width - size))
    corners = np.stack([np.full_like(starts, band.core), starts - left], 1).astype(np.int32)
    return Pieces(np.stack([band.pixels[:, x : x + size] for x in left]), corners)


def join(cores: np.ndarray, band: Band) -> np.ndarray:
    """The map `[height, w]` of a band from those of its tiles, `[n, min(tile, h), min(tile, w)]`."""
    n, _, tile = cores.shape
    rows, last = slice(band.offset, band.offset + band.height), band.pixels.shape[1] - (n - 1) * tile
    left = tile - last if n > 1 else 0
    return np.concatenate([*cores[:-1, rows], cores[-1, rows, left : left + last]], axis=1)


def maxima(joined: np.ndarray, tile: int) -> np.ndarray:
    """The greatest value of each tile of a band's map `[h, w]`: `[n]`."""
    return np.maximum.reduceat(joined.max(0), np.arange(0, joined.shape[1], tile))
