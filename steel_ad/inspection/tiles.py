"""A strip in tiles at fixed places. A detector sees each tile in a window, with a halo of its surroundings.

Tiles begin at the strip's first row and column, in whatever pieces the strip is read. The last tile of each direction lies flush
with the strip's end, and only the part of its map that the tile before does not show is taken. A window that would reach beyond an end is
moved inside, since a mirrored pattern would look like a defect. A strip that is smaller than a window is one window. So a map
depends on nothing but the strip, and calibration and inspection look at the same unit.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """A row of tiles.

    Attributes:
      top: the strip's row that the band begins with.
      height: number of its rows, 1..tile.
      pixels: of its windows, uint8 `[min(tile + 2 halo, h), w]` of a strip `[h, w]`.
      offset: rows of its tiles above `top`; the band before shows them.
      core: row of `pixels` that the tiles begin with, which is the strip's row `top - offset`.
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
    """The bands of a strip of any length; a chunk and a few bands are in memory at a time.

    Args:
      chunks: uint8 `[h_i, w]`, which follow each other along the strip.
      tile: side of a tile, in pixels.
      halo: in pixels, on each side.

    Raises:
      ValueError: chunks of different widths, or not uint8 `[h, w]`.
    """
    cutter = Cutter(tile, halo)
    for chunk in chunks:
        yield from cutter.push(chunk)
    yield from cutter.end()


@dataclasses.dataclass
class Cutter:
    """Cuts the bands of a strip that comes piece by piece, and that may go on after what would be its end.

    Attributes:
      tile, halo: as of `bands`.
      top: the strip's row that the next band begins with.
      first: the strip's row that `kept` begins with, at most `needed(top)`.
      kept: uint8 `[h, w]`, the rows that bands to come may show.
    """

    tile: int
    halo: int
    top: int = 0
    first: int = 0
    kept: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.uint8))

    def needed(self, top: int) -> int:
        """The first row that windows of a band from `top` on may show, whether or not the strip ends there."""
        return max(0, top - self.tile - self.halo)

    def push(self, chunk: np.ndarray) -> Iterator[Band]:
        """The bands that a further piece of the strip, uint8 `[h, w]`, completes; the caller must draw all of them.

        Raises:
          ValueError: another width than before, or not uint8 `[h, w]`.
        """
        known = self.first + len(self.kept)
        if chunk.dtype != np.uint8 or chunk.ndim != 2 or (known and chunk.shape[1] != self.kept.shape[1]):
            raise ValueError(
                f"a chunk of {chunk.dtype}{list(chunk.shape)} does not follow one of width {self.kept.shape[1]}"
            )
        self.kept = np.concatenate([self.kept, chunk]) if len(self.kept) else chunk
        size = self.tile + 2 * self.halo
        # A whole window lies where it would on any longer strip.
        while (start := max(0, self.top - self.halo)) + size <= self.first + len(self.kept):
            yield Band(self.top, self.tile, self.kept[start - self.first :][:size], 0, self.top - start)
            self.top += self.tile
            gone = max(0, self.needed(self.top) - self.first)
            self.kept, self.first = self.kept[gone:], self.first + gone

    def end(self) -> Iterator[Band]:
        """The bands that are left if the strip ends here; it may still go on."""
        size, end = self.tile + 2 * self.halo, self.first + len(self.kept)
        for top in range(self.top, end, self.tile):
            height = min(self.tile, end - top)
            offset = min(top, self.tile - height)
            start = max(0, min(top - offset - self.halo, end - size))
            yield Band(top, height, self.kept[start - self.first :][:size], offset, top - offset - start)


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


def whole(band: Band, *, tile: int) -> np.ndarray:
    """The band's tiles that no other tile overlaps: uint8 `[n, tile, tile]`."""
    rows = band.pixels[band.core : band.core + tile]
    n = rows.shape[1] // tile if band.height == tile else 0
    return rows[:, : n * tile].reshape(len(rows), n, tile).transpose(1, 0, 2)


def maxima(joined: np.ndarray, tile: int) -> np.ndarray:
    """The greatest value of each tile of a band's map `[h, w]`: `[n]`."""
    return np.maximum.reduceat(joined.max(0), np.arange(0, joined.shape[1], tile))
