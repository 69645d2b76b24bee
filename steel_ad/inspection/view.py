"""How a detector sees a strip: the opened map of each tile, computed from a window with the tile's surroundings."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad.detectors import Fitted, opened
from steel_ad.errors import InputError
from steel_ad.inspection import tiles
from steel_ad.inspection.tiles import Band, Pieces
from steel_ad.ops.convolution import cpu_compiler_options


class View:
    """A detector's opened maps of bands, tile by tile.

    Attributes:
      tile: side of a tile, px.
      halo: surroundings of a tile that the detector sees, on each side, px.
    """

    def __init__(self, fitted: Fitted, config: configs.Inspection):
        self.tile, self.halo = config.tile_px, config.halo_px
        self._least, self._state = fitted.least_px, fitted.state
        detector, radius = fitted.detector, fitted.radius

        def core(state, window, corner):
            maps = opened.open_maps(detector, state, window, radius=radius)[detector.name]
            sides = [min(self.tile, side) for side in window.shape]
            return jax.lax.dynamic_slice(maps.opened, (corner[0], corner[1]), sides)

        self._program = jax.jit(jax.vmap(core, in_axes=(None, 0, 0)), compiler_options=cpu_compiler_options())

    def check(self, shape: Sequence[int]) -> None:
        """Refuses what the detector cannot see.

        Raises:
          InputError: `shape` is smaller than the detector's least side.
        """
        if min(shape) < self._least:
            raise InputError(
                f"what is inspected is {min(shape)} pixels high or wide, less than the detector's patch of {self._least}"
            )

    def cut(self, band: Band) -> Pieces:
        """The band's windows."""
        return tiles.cut(band, tile=self.tile, halo=self.halo)

    def cores(self, pieces: Pieces) -> np.ndarray:
        """Opened maps of the windows' tiles: float32 `[n, min(tile, h), min(tile, w)]`.

        Raises:
          InputError: windows that the detector cannot see, or maps that are not finite.
        """
        return _fetched(self._begin(pieces), len(pieces.pixels))

    def maps(self, bands: Iterable[tuple[int, Band]]) -> Iterator[tuple[int, Band, np.ndarray]]:
        """(strip, band, opened map float32 `[height, w]`); the device works on a band while the next one is prepared.

        Raises:
          InputError: as `cores`.
        """
        under_way: list[tuple[int, Band, list[jax.Array]]] = []

        def oldest() -> tuple[int, Band, np.ndarray]:
            strip, band, batches = under_way.pop(0)
            return strip, band, tiles.join(_fetched(batches, -(-band.pixels.shape[1] // self.tile)), band)

        for strip, band in bands:
            under_way.append((strip, band, self._begin(self.cut(band))))
            if len(under_way) > 1:
                yield oldest()
        while under_way:
            yield oldest()

    def _begin(self, pieces: Pieces) -> list[jax.Array]:
        self.check(pieces.pixels.shape[1:])
        size = opened.at_once((self.tile, self.tile))
        # The last batch repeats a window, so that one program serves all.
        missing = -len(pieces.pixels) % size
        padded = [np.concatenate([a, np.repeat(a[-1:], missing, 0)]) for a in pieces]
        batches = zip(*(a.reshape(-1, size, *a.shape[1:]) for a in padded), strict=True)
        return [self._program(self._state, pixels, corners) for pixels, corners in batches]


def _fetched(batches: list[jax.Array], count: int) -> np.ndarray:
    maps = np.concatenate(jax.device_get(batches))[:count]
    if not np.isfinite(maps).all():
        raise InputError("the detector's map is not finite, so nothing can be said: train the model again", status=1)
    return maps
