"""Linear smoothing."""

import functools

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
    if size > 31:
        x = _run_sum(_run_sum(x, size, 0), size, 1)
    else:
        x = lax.reduce_window(x, zero, lax.add, (size, 1), (1, 1), "VALID")
        x = lax.reduce_window(x, zero, lax.add, (1, size), (1, 1), "VALID")
    return x * np.asarray(1 / size**2, x.dtype)


def _run_sum(x: Array, size: int, axis: int) -> Array:
    """Sums of `size` values in a row, from runs of 1, 2, 4, ...: a few passes, however long."""
    outputs = x.shape[axis] - size + 1
    total, done, run = None, 0, 1
    while done < size:
        if size & run:
            part = lax.slice_in_dim(x, done, done + outputs, axis=axis)
            total, done = part if total is None else total + part, done + run
        if done < size:
            n = x.shape[axis]
            x = lax.slice_in_dim(x, 0, n - run, axis=axis) + lax.slice_in_dim(x, run, n, axis=axis)
            run *= 2
    assert total is not None
    return total


@functools.lru_cache(maxsize=16)
def _gaussian_weights(size: int, spread_px: float) -> np.ndarray:
    at = np.arange(size)
    weights = np.exp(-0.5 * np.square((at[:, None] - at[None, :]) / spread_px))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def gaussian_mean(images: Array, spread_px: float) -> Array:
    """Mean of images float32 `[b, h, w]` under a Gaussian around every pixel, cut off at the borders.

    By two products of matrices: the fastest form on CPU for patches.
    """
    rows, columns = (_gaussian_weights(size, spread_px) for size in images.shape[1:])
    return jnp.einsum("yi,bij,xj->byx", rows, images, columns)


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
