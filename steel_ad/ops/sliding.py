"""Overlapping windows of an image, and the image averaged from them (SPEC section 4, Test)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# How much smaller `heads` make an image, and the pixels at a window's edge that become two, the outer one changed by zeros.
_REDUCTION, _EDGE = 4, 8
# Rows of a large image that go through a head at once.
_BAND = 128


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
    rows = _unfold(image, 0, size, stride)  # [r, size, w, ...]
    both = _unfold(rows, 2, size, stride)  # [r, size, c, size, ...]
    return both.swapaxes(1, 2).reshape(-1, size, size, *image.shape[2:])


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
    return add(tiles)[0] / _covered(shape, size, stride, tiles.dtype)


def _covered(shape: tuple[int, int], size: int, stride: int, dtype: jnp.dtype) -> Array:
    """How many windows hold each pixel, `[h, w]`."""

    def along(length: int) -> np.ndarray:
        at, first = np.arange(length)[:, None], np.array(positions(length, size, stride))[None, :]
        return np.sum((first <= at) & (at < first + size), axis=1)

    rows, columns = (jnp.asarray(along(length), dtype) for length in shape)
    return rows[:, None] * columns[None, :]


def heads(head: Callable[[Array], Array], image: Array, *, size: int, stride: int) -> Array:
    """`head(windows(image))`, where windows that overlap share what they have in common; equal up to rounding.

    Only what the zeros around a window change is computed for it alone: the outermost pixels of its result. Where windows do not
    overlap, or do not all begin at multiples of 4 pixels, each is computed by itself.

    Args:
      head: `[n, h, w]` -> `[n, h / 4, w / 4, c]`: two convolutions of 4x4 pixels and stride 2, padded by 1, and what acts on each
        pixel by itself.
      image: as `windows`'.
      size, stride: as `windows`'.

    Returns:
      `[n, size / 4, size / 4, c]`.

    Raises:
      ValueError: as `positions`.
    """
    known = _whole(head, image) if _shares(image.shape, size, stride) else None
    return _heads(head, image, known, size, stride)


def _shares(shape: tuple[int, ...], size: int, stride: int) -> bool:
    starts = [start for length in shape for start in positions(length, size, stride)]
    return stride < size and size >= 2 * _EDGE and all(n % _REDUCTION == 0 for n in (size, stride, *shape, *starts))


def _whole(head: Callable[[Array], Array], image: Array) -> Array:
    """What `head` makes of a whole image, `[h / 4, w / 4, c]`, but for its outermost pixels; of a large one in bands."""
    height = image.shape[0]
    if height <= 2 * _BAND:
        return head(image[None])[0]
    bands, beyond = -(-height // _BAND), _EDGE // _REDUCTION
    image = jnp.pad(image, ((_EDGE, bands * _BAND - height + _EDGE), (0, 0)))

    def band(top: Array) -> Array:
        return head(lax.dynamic_slice_in_dim(image, top, _BAND + 2 * _EDGE)[None])[0, beyond:-beyond]

    found = lax.map(band, _BAND * jnp.arange(bands))
    return found.reshape(-1, *found.shape[2:])[: height // _REDUCTION]


def _heads(head: Callable[[Array], Array], image: Array, known: Array | None, size: int, stride: int) -> Array:
    """`heads`, given `_whole`'s `known` where windows share it, `[h / 4, w / 4, c]`."""
    if known is None:
        return head(_extract(image, size, stride))
    (height, width), channels = image.shape, known.shape[-1]
    side, step = size // _REDUCTION, stride // _REDUCTION
    # Of each window the first and the last pixels along an axis, `[2, windows, _EDGE]`.
    ends = np.array([0, size - _EDGE])[:, None, None] + np.arange(_EDGE)
    at_rows, at_columns = (ends + np.array(positions(length, size, stride))[:, None] for length in image.shape)
    r, c = at_rows.shape[1], at_columns.shape[1]
    # An edge becomes two pixels, of which the zeros beyond it reach the outer one.
    across = head(image[at_rows].reshape(-1, _EDGE, width)).reshape(2, r, 2, -1, channels)
    across = _unfold(jnp.stack([across[0, :, 0], across[1, :, 1]]), 2, side, step)  # [2, r, c, side, channels]
    down = head(image[:, at_columns].transpose(1, 2, 0, 3).reshape(-1, height, _EDGE)).reshape(2, c, -1, 2, channels)
    down = _unfold(jnp.stack([down[0, :, :, 0], down[1, :, :, 1]]), 2, side, step).swapaxes(1, 2)
    corners = image[at_rows[:, None, :, None, :, None], at_columns[None, :, None, :, None, :]]
    corners = head(corners.reshape(-1, _EDGE, _EDGE)).reshape(2, 2, r, c, 2, 2, channels)
    inner = _extract(known, side, step).reshape(r, c, side, side, channels)[:, :, 1:-1, 1:-1]
    middle = jnp.concatenate([down[0, :, :, 1:-1, None], inner, down[1, :, :, 1:-1, None]], axis=3)
    above, below = (
        jnp.concatenate([corners[i, 0, :, :, i, :1], across[i, :, :, 1:-1], corners[i, 1, :, :, i, 1:]], axis=2)
        for i in range(2)
    )
    return jnp.concatenate([above[:, :, None], middle, below[:, :, None]], axis=2).reshape(-1, side, side, channels)


def through(
    function: Callable[[Array], Array],
    image: Array,
    *,
    size: int,
    stride: int,
    at_once: int,
    head: Callable[[Array], Array] | None = None,
) -> Array:
    """`average(function(windows(image)))`, but for large images with few windows in memory at a time.

    Args:
      function: `[n, size, size]`, or what `head` makes of it, -> `[n, size, size]`, each window by itself.
      image: as `windows`'.
      size, stride: as `windows`'.
      at_once: most windows that `function` gets; the windows in memory are as many, or a row of them if that is more.
      head: as `heads`': what comes before `function`, shared by windows that overlap.

    Returns:
      `[h, w]` of the function's dtype.

    Raises:
      ValueError: as `positions`, or `at_once` is below 1.
    """
    if at_once < 1:
        raise ValueError(f"at least one window must go through at once, not {at_once}")
    known = _whole(head, image) if head and _shares(image.shape, size, stride) else None

    def tiles_of(strip: Array, known: Array | None) -> Array:
        return _heads(head, strip, known, size, stride) if head else _extract(strip, size, stride)

    rows, columns = (len(positions(length, size, stride)) for length in image.shape)
    if rows * columns <= at_once:
        return average(function(tiles_of(image, known)), shape=image.shape, stride=stride)
    return _by_rows(function, tiles_of, image, known, size, stride, at_once)


def _by_rows(
    function: Callable[[Array], Array],
    tiles_of: Callable[[Array, Array | None], Array],
    image: Array,
    known: Array | None,
    size: int,
    stride: int,
    at_once: int,
) -> Array:
    """`through`, some rows of windows at a time: `tiles_of` makes of a strip `[size, w]`, and of `known` of it, its windows."""
    height, width = image.shape
    rows, columns = (positions(length, size, stride) for length in image.shape)
    per_step = max(1, at_once // len(columns))
    surplus = -len(rows) % per_step
    # The last step repeats a row of windows, which then counts nothing.
    tops = np.array(rows + rows[-1:] * surplus, np.int32).reshape(-1, per_step)
    weights = np.array([1.0] * len(rows) + [0.0] * surplus, np.float32).reshape(tops.shape)
    extract = functools.partial(_extract, size=size, stride=stride)

    def windows_at(row: Array) -> Array:
        part = known
        if part is not None:
            part = lax.dynamic_slice_in_dim(part, row // _REDUCTION, size // _REDUCTION)
        return tiles_of(lax.dynamic_slice_in_dim(image, row, size), part)

    def strips(tiles: Array) -> Array:
        add = jax.linear_transpose(extract, jax.ShapeDtypeStruct((size, width), tiles.dtype))
        return jax.vmap(lambda row: add(row)[0])(tiles.reshape(per_step, len(columns), size, size))

    def step(total: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        top, weight = given
        cuts = jax.vmap(windows_at)(top)
        tiles = cuts.reshape(-1, *cuts.shape[2:])
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

    tile = jax.eval_shape(lambda x: function(tiles_of(x, None)), jax.ShapeDtypeStruct((size, size), image.dtype))
    total, _ = lax.scan(step, jnp.zeros((height, width), tile.dtype), (jnp.asarray(tops), jnp.asarray(weights)))
    return total / _covered((height, width), size, stride, tile.dtype)
