"""Spectral whitening: an image's DFT divided by what the line's plates have at each frequency on average."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from steel_ad import config as configs
from steel_ad.data.patches import common_size
from steel_ad.detectors import Detector
from steel_ad.ops import sliding, spectrum
from steel_ad.ops.filters import box_mean


@dataclasses.dataclass(frozen=True)
class WhiteningDetector(Detector):
    """Root mean square, over two box means of `smoothing_px`, of the image whitened in windowed tiles that overlap by half.

    Windowed, so that a tile's borders do not ring; in tiles, so that images of any size from `tile` up share one spectrum.
    """

    tile: int = 128
    smoothing_px: int = 9
    images: int = 24

    name = "whitening"

    @property
    def least_px(self) -> int:  # type: ignore[override]
        return max(self.tile, self.smoothing_px)

    @classmethod
    def configured(cls, config: configs.Spectrum) -> "WhiteningDetector":
        return cls(config.tile, config.smoothing_px, config.images)

    def fit(self, images: Sequence[np.ndarray]) -> dict[str, Array]:
        """`amplitude`: mean amplitude spectrum of the tiles of up to `images` good images, `[tile, tile // 2 + 1]`."""
        total, count = jnp.zeros((self.tile, self.tile // 2 + 1)), 0
        amplitude = jax.jit(lambda image: spectrum.mean_amplitude(self._tiles(image)))
        for image in common_size(images, self.images):
            total, count = total + amplitude(image), count + 1
        return {"amplitude": total / count}

    def _tiles(self, image: Array) -> Array:
        return sliding.windows(image, size=self.tile, stride=self.tile // 2)

    def residual(self, state: dict[str, Array], image: Array) -> Array:
        """Map float32 `[h, w]` of an image `[h, w]`, both sides at least `tile`."""
        tiles, amplitude = self._tiles(image), state["amplitude"]
        weight = jnp.asarray(spectrum.window((self.tile, self.tile)))
        tiles = (tiles - tiles.mean((1, 2), keepdims=True)) * weight[None]
        # No frequency counts as emptier than a thousandth of the fullest: there is noise enough.
        white = jnp.fft.rfft2(tiles)
        white = white / jnp.maximum(amplitude, 1e-3 * amplitude.max() + 1e-9)[None].astype(white.dtype)
        # 3 / 8 is the window's root mean square: a good plate's residual is about 1.
        white = jnp.fft.irfft2(white, (self.tile, self.tile)) * np.float32(self.tile * 3 / 8)
        shape, stride = (image.shape[0], image.shape[1]), self.tile // 2
        whole = sliding.average(white, shape=shape, stride=stride)
        weights = sliding.average(jnp.broadcast_to(weight, white.shape), shape=shape, stride=stride)
        # At the image's border the window leaves little of it, and what leaks there would be blown up.
        whole = whole / jnp.maximum(weights, 0.25)
        return jnp.sqrt(box_mean(box_mean(whole * whole, self.smoothing_px), self.smoothing_px))
