"""Phase-only transform: what does not repeat keeps its energy when every frequency gets the same (Aiger and Talbot 2010)."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from steel_ad import config as configs
from steel_ad.detectors import Detector
from steel_ad.ops.filters import box_mean


@dataclasses.dataclass(frozen=True)
class PhaseOnlyDetector(Detector):
    """Root mean square, over two box means of `smoothing_px`, of the image with every amplitude of its DFT set to 1.

    A pattern is few, strong frequencies; a defect is faint in many. The residual's mean square is 1, of whatever image that
    has all frequencies; of a flat one, which has a single frequency, it is next to 0.
    """

    smoothing_px: int = 9

    name = "phase_only"

    @property
    def least_px(self) -> int:  # type: ignore[override]
        return self.smoothing_px

    @classmethod
    def configured(cls, config: configs.Spectrum) -> "PhaseOnlyDetector":
        return cls(config.smoothing_px)

    def fit(self, images: Sequence[np.ndarray]) -> dict[str, Array]:
        """Nothing: an image is judged by itself."""
        return {}

    def residual(self, state: dict[str, Array], image: Array) -> Array:
        """Map float32 `[h, w]` of an image `[h, w]`, both sides at least `smoothing_px`."""
        spectrum = jnp.fft.fft2(image)
        amplitude = jnp.abs(spectrum)
        # Frequencies that rounding alone fills have no phase.
        phasor = spectrum / jnp.maximum(amplitude, 1e-6 * amplitude.max() + 1e-12).astype(spectrum.dtype)
        flat = jnp.fft.ifft2(phasor).real
        energy = flat * flat * jnp.asarray(image.size, image.dtype)
        return jnp.sqrt(box_mean(box_mean(energy, self.smoothing_px), self.smoothing_px))
