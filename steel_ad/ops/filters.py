"""Linear smoothing of one map."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def box_mean(x: Array, size: int) -> Array:
    """Mean over a square window around every pixel, floating `[h, w]` -> `[h, w]`, reflected at the borders (numpy's "reflect").

    Raises:
      ValueError: the window is even, or reaches further than the reflection can.
    """
    if size % 2 == 0 or size // 2 >= min(x.shape):
        raise ValueError(f"the window of {size} must be odd and at most {2 * min(x.shape) - 1} on a map {x.shape}")
    zero = np.zeros((), x.dtype)
    x = jnp.pad(x, size // 2, mode="reflect")
    x = lax.reduce_window(x, zero, lax.add, (size, 1), (1, 1), "VALID")
    x = lax.reduce_window(x, zero, lax.add, (1, size), (1, 1), "VALID")
    return x * np.asarray(1 / size**2, x.dtype)


def sample(x: Array, y_px: Array, x_px: Array) -> Array:
    """Bilinear samples of a map `[h, w]` at places `[...]` in pixels, clamped into it: floating `[...]`."""
    h, w = x.shape
    y_px, x_px = jnp.clip(y_px, 0, h - 1), jnp.clip(x_px, 0, w - 1)
    top, left = jnp.minimum(jnp.floor(y_px), h - 2), jnp.minimum(jnp.floor(x_px), w - 2)
    down, right = y_px - top, x_px - left
    first = top.astype(jnp.int32) * w + left.astype(jnp.int32)
    flat = x.ravel()
    above = flat[first] * (1 - right) + flat[first + 1] * right
    below = flat[first + w] * (1 - right) + flat[first + w + 1] * right
    return above * (1 - down) + below * down
