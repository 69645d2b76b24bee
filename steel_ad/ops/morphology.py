"""Flat morphology with a disk (SPEC section 4, Post-processing)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def disk(radius: int) -> np.ndarray:
    """Footprint of a disk, bool `[2 radius + 1, 2 radius + 1]`: pixels with dx^2 + dy^2 <= radius^2."""
    offsets = np.arange(-radius, radius + 1)
    return offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2


def _bounds(dtype) -> tuple:
    return (-np.inf, np.inf) if jnp.issubdtype(dtype, jnp.floating) else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)


def _rank(x: Array, radius: int, pick, outside) -> Array:
    """Minimum or maximum (`pick`) over a disk: its rows are runs, so each distinct run length is made once."""
    h, w = x.shape
    padded = jnp.pad(x, radius, constant_values=np.asarray(outside, x.dtype))
    runs = {}
    run, half = padded[:, radius : radius + w], 0
    widths = {dy: math.isqrt(radius * radius - dy * dy) for dy in range(-radius, radius + 1)}
    for wanted in sorted(set(widths.values())):
        while half < wanted:
            half += 1
            left, right = (padded[:, radius + s : radius + s + w] for s in (-half, half))
            run = pick(run, pick(left, right))
        runs[wanted] = run
    return functools.reduce(pick, (runs[widths[dy]][radius + dy : radius + dy + h] for dy in widths))


@functools.partial(jax.jit, static_argnames="radius")
def grey_opening(x: Array, *, radius: int) -> Array:
    """Erosion, then dilation, by a flat disk; pixels outside of the image take no part in either.

    It commutes with thresholding: `grey_opening(x) > t` is the binary opening of `x > t`, for every t.

    Args:
      x: `[h, w]`, real.
      radius: the disk's radius in pixels, >= 0; 4 gives the thesis' 9x9 footprint, 0 changes nothing.

    Returns:
      `[h, w]`, x's dtype, nowhere above x.

    Raises:
      ValueError: x is no single map, or the radius is negative.
    """
    if x.ndim != 2 or radius < 0:
        raise ValueError(f"opening takes one map [h, w] and a radius >= 0, not {x.shape} and {radius}")
    low, high = _bounds(x.dtype)
    return _rank(_rank(x, radius, lax.min, high), radius, lax.max, low)
