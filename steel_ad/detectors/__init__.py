"""Anomaly detectors behind one protocol: trained networks and training-free methods alike."""

from typing import Any, Protocol

from jax import Array

from steel_ad.data.patches import Plates


class Detector(Protocol):
    """What evaluation, calibration and inspection know of a method.

    A new detector is a class with these two methods and one line in a study's table of detectors.
    """

    def fit(self, images: Plates) -> Any:
        """The state (a pytree of arrays) learned from good images."""
        ...

    def residual(self, state: Any, image: Array) -> Array:
        """How unlike a good plate each pixel is: image float32 `[h, w]` in [0, 1] -> float32 `[h, w]`, higher is worse.

        Pure and jittable; `jax.vmap` makes the batch.
        """
        ...
