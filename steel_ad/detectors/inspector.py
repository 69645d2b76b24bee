"""A detector as one program from camera pixels to maps and scores (SPEC section 4, Test)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from steel_ad.detectors import Detector
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.ops.morphology import grey_opening


class Inspected(NamedTuple):
    """Of a batch of images, float16: residual maps `raw` and `opened` `[b, h, w]`, and `score` `[b]`, the opened maps' maxima."""

    raw: Array
    opened: Array
    score: Array


def inspector(detector: Detector, *, radius: int) -> Callable[[Any, Any], Inspected]:
    """Jitted `(state, images uint8 [b, h, w]) -> Inspected`; `state` is what the detector's `fit` returned.

    Rounding to float16 and a flat opening commute, so `opened` is the opening of `raw`. On CPU the images go through one
    after the other, since a batch's activations leave the caches; elsewhere together.

    Args:
      radius: of the opening's disk, in pixels.
    """

    def one(state: Any, image: Array) -> Inspected:
        raw = detector.residual(state, image.astype(jnp.float32) / 255)
        opened = grey_opening(raw, radius=radius)
        return Inspected(*(a.astype(jnp.float16) for a in (raw, opened, opened.max())))

    def batch(state: Any, images: Array) -> Inspected:
        size = 1 if jax.default_backend() == "cpu" else images.shape[0]
        return jax.lax.map(lambda image: one(state, image), images, batch_size=size)

    return jax.jit(batch, compiler_options=cpu_compiler_options())
