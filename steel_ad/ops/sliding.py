"""Overlapping windows of an image, and the image averaged from them (SPEC section 4, Test)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def positions(length: int, size: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis: every `stride`, and one more flush with the end where they miss it.

    Raises:
      ValueError: a window longer than the axis, or a stride that leaves gaps.
    """
    if not 1 <= size <= length:
        raise ValueError(f"a window of {size} pixels does not fit into an image side of {length}")
    if not 1 <= stride <= size:
        raise ValueError(f"a stride of {stride} must lie in 1..{size}, the window's size, or pixels are left out")
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] == length - size else [*starts, length - size]


def _unfold(x: Array, axis: int, size: int, stride: int) -> Array:
    """Windows along one axis, as a new axis before it, by slices and concatenations alone: their transpose is as fast."""
    starts = positions(x.shape[axis], size, stride)
    regular = (x.shape[axis] - size) // stride + 1
    per_window = -(-size // stride)
    blocks = regular - 1 + per_window
    end = blocks * stride
    flush = None
    if len(starts) > regular:
        flush = jnp.expand_dims(lax.slice_in_dim(x, starts[-1], starts[-1] + size, axis=axis), axis)
    if end > x.shape[axis]:
        x = jnp.pad(x, [(0, end - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])
    x = lax.slice_in_dim(x, 0, end, axis=axis)
    x = x.reshape(*x.shape[:axis], blocks, stride, *x.shape[axis + 1 :])
    x = jnp.concatenate([lax.slice_in_dim(x, i, i + regular, axis=axis) for i in range(per_window)], axis=axis + 1)
    x = lax.slice_in_dim(x, 0, size, axis=axis + 1)
    return x if flush is None else jnp.concatenate([x, flush], axis=axis)


def _extract(image: Array, size: int, stride: int) -> Array:
    rows = _unfold(image, 0, size, stride)  # [r, size, w]
    both = _unfold(rows, 2, size, stride)  # [r, size, c, size]
    return both.transpose(0, 2, 1, 3).reshape(-1, size, size)


@functools.partial(jax.jit, static_argnames=("size", "stride"))
def windows(image: Array, *, size: int, stride: int) -> Array:
    """All windows of an image, row by row.

    Args:
      image: `[h, w]`, any dtype, at least `size` on both sides.
      size: the window's side in pixels.
      stride: pixels from one window to the next, 1..size; the last one of a row or column is flush with the border.

    Returns:
      `[n, size, size]`; a 256x256 image has n = 25 windows of 128 at stride 32.

    Raises:
      ValueError: as `positions`.
    """
    return _extract(image, size, stride)


@functools.partial(jax.jit, static_argnames=("shape", "stride"))
def average(tiles: Array, *, shape: tuple[int, int], stride: int) -> Array:
    """The image of which `windows` made the tiles; where tiles overlap, their mean.

    Args:
      tiles: `[n, size, size]`, floating, in `windows`' order.
      shape: height and width of the image.
      stride: as given to `windows`.

    Returns:
      `[h, w]`; `average(windows(image)) == image` up to rounding.

    Raises:
      ValueError: as `positions`, or n is not the number of windows of such an image.
    """
    size = tiles.shape[-1]
    n = len(positions(shape[0], size, stride)) * len(positions(shape[1], size, stride))
    if tiles.shape != (n, size, size):
        raise ValueError(f"an image of {shape[0]}x{shape[1]} has {n} windows of {size}x{size}, not {tiles.shape}")
    extract = functools.partial(_extract, size=size, stride=stride)
    add = jax.linear_transpose(extract, jax.ShapeDtypeStruct(shape, tiles.dtype))
    (total,), (count,) = add(tiles), add(jnp.ones_like(tiles))
    return total / count


def through(function: Callable[[Array], Array], image: Array, *, size: int, stride: int, at_once: int) -> Array:
    """`average(function(windows(image)))`, but for large images with few windows in memory at a time.

    Args:
      function: `[n, size, size]` -> `[n, size, size]`, each window by itself.
      image: as `windows`'.
      size, stride: as `windows`'.
      at_once: most windows that `function` gets; the windows in memory are as many, or a row of them if that is more.

    Returns:
      `[h, w]` of the function's dtype.

    Raises:
      ValueError: as `positions`, or `at_once` is below 1.
    """
    if at_once < 1:
        raise ValueError(f"at least one window must go through at once, not {at_once}")
    height, width = image.shape
    rows, columns = (positions(length, size, stride) for length in (height, width))
    if len(rows) * len(columns) <= at_once:
        return average(function(windows(image, size=size, stride=stride)), shape=(height, width), stride=stride)
    per_step = max(1, at_once // len(columns))
    surplus = -len(rows) % per_step
    # The last step repeats a row of windows, which then counts nothing.
    tops = np.array(rows + rows[-1:] * surplus, np.int32).reshape(-1, per_step)
    weights = np.array([1.0] * len(rows) + [0.0] * surplus, np.float32).reshape(tops.shape)
    extract = functools.partial(_extract, size=size, stride=stride)

    def strips(tiles: Array) -> Array:
        add = jax.linear_transpose(extract, jax.ShapeDtypeStruct((size, width), tiles.dtype))
        return jax.vmap(lambda row: add(row)[0])(tiles.reshape(per_step, len(columns), size, size))

    def step(total: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        top, weight = given
        cut = jax.vmap(lambda row: extract(lax.dynamic_slice(image, (row, jnp.zeros_like(row)), (size, width))))(top)
        tiles = cut.reshape(-1, size, size)
        if len(tiles) <= at_once:
            tiles = function(tiles)
        else:
            tiles = lax.map(lambda tile: function(tile[None])[0], tiles, batch_size=at_once)
        added = strips(tiles) * weight.astype(tiles.dtype)[:, None, None]
        for i in range(per_step):
            at = top[i], jnp.zeros_like(top[i])
            strip = lax.dynamic_slice(total, at, (size, width)) + added[i]
            total = lax.dynamic_update_slice(total, strip, at)
        return total, None

    dtype = jax.eval_shape(function, jax.ShapeDtypeStruct((1, size, size), image.dtype)).dtype
    total, _ = lax.scan(step, jnp.zeros((height, width), dtype), (jnp.asarray(tops), jnp.asarray(weights)))

    def covered(length: int, starts: list[int]) -> Array:
        """How many windows hold each row or column."""
        at, first = np.arange(length)[:, None], np.array(starts)[None, :]
        return jnp.asarray(np.sum((first <= at) & (at < first + size), axis=1), dtype)

    return total / (covered(height, rows)[:, None] * covered(width, columns)[None, :])
