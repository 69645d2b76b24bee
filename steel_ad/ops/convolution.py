"""Convolutions of the networks, exact, in the form that the backend runs fast (`ops.forms`).

A 4x4 convolution of stride 2 is a 2x2 one over 2x2 blocks of its input; its transpose is a 2x2 one to 2x2 blocks of its output: on
CPU and GPU a step of the autoencoder takes little more than half of the time.
Kernels are always laid out `[kh, kw, in, out]` as `lax.conv_general_dilated` and `lax.conv_transpose` take them. Where a
bias `[1, 1, 1, out]` and the slope of a leaky ReLU (or `logistic`) are given, they are applied to the result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from steel_ad import native
from steel_ad.ops import forms

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def cpu_compiler_options() -> dict[str, str] | None:
    """Options for the outermost `jax.jit`: on CPU they keep VALID convolutions off a single-threaded library path."""
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" and _knows_ynn() else None


def _knows_ynn() -> bool:
    global _YNN
    if _YNN is None:
        try:
            options = {"xla_cpu_experimental_ynn_fusion_type": ""}
            jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
            _YNN = True
        except Exception:  # an older or newer XLA that has no such flag needs none
            _YNN = False
    return _YNN


_YNN: bool | None = None


def same(x: Array, kernel: Array, bias: Array | None = None, slope: float = 1.0) -> Array:
    """Stride 1, "SAME" padding: `[b, h, w, i]`, `[k, k, i, o]` -> `[b, h, w, o]`."""
    if forms.choose("same", x, kernel) == "native":
        return _native(x, kernel, bias, "same", slope)
    return _finish(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS), bias, slope)


def _finish(y: Array, bias: Array | None, slope: float) -> Array:
    y = y if bias is None else add_bias(y, bias)
    return y if slope == 1.0 else jax.nn.leaky_relu(y, slope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _native(x: Array, kernel: Array, bias: Array | None, kind: str, slope: float) -> Array:
    offset = None if bias is None else bias.reshape(-1)
    if kind != "double":
        return native.convolve(x, kernel, offset, stride=1 if kind == "same" else 2, slope=slope)
    return native.double(x, kernel, offset, slope=slope)


def _native_forward(x: Array, kernel: Array, bias: Array | None, kind: str, slope: float):
    y = _native(x, kernel, bias, kind, slope)
    return y, (x, kernel, bias, None if slope == 1.0 else y)


def _native_backward(kind: str, slope: float, saved, g: Array) -> tuple[Array, Array, Array | None]:
    # The leaky ReLU's derivative is known from its results, and is multiplied in while gradients are read.
    x, kernel, bias, y = saved
    adjoint = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    if kind == "halve":
        of_x = native.double(g, adjoint, None, slope=slope, of=y)
    else:
        of_x = native.convolve(g, adjoint, None, stride=1 if kind == "same" else 2, slope=slope, of=y)
    stride = 1 if kind == "same" else 2
    if kind == "double":  # the transpose of a strided convolution of g with the adjoint, of which x is the gradient
        of_adjoint, of_bias = native.filter_gradient(g, x, 4, stride=2, slope=slope, of=y, exchanged=True)
        of_kernel = of_adjoint[::-1, ::-1].transpose(0, 1, 3, 2)
    else:
        of_kernel, of_bias = native.filter_gradient(x, g, kernel.shape[0], stride=stride, slope=slope, of=y)
    return of_x, of_kernel, None if bias is None else of_bias.reshape(bias.shape)


_native.defvjp(_native_forward, _native_backward)


@jax.custom_vjp
def _native_logistic(x: Array, kernel: Array, bias: Array | None) -> Array:
    return native.double(x, kernel, None if bias is None else bias.reshape(-1), slope=1.0, logistic=True)


def _native_logistic_forward(x: Array, kernel: Array, bias: Array | None):
    y = _native_logistic(x, kernel, bias)
    return y, (x, kernel, bias, y)


def _native_logistic_backward(saved, g: Array) -> tuple[Array, Array, Array | None]:
    x, kernel, bias, y = saved
    return _native_backward("double", 1.0, (x, kernel, bias, None), g * y * (1 - y))


_native_logistic.defvjp(_native_logistic_forward, _native_logistic_backward)


# Output pixels of a tile: 32 is 10 % faster at 11x11, but 60 % slower at 7x7.
_VALID_PX = 22


def large(x: Array, kernel: Array) -> Array:
    """`same` of a kernel of 7x7 or more, k odd: `[b, h, w, i]`, `[k, k, i, o]` -> `[b, h, w, o]`, x's dtype.

    On CPU a product of spectra of overlapping tiles, in float32 and to 1e-6 of the largest value: a step of CompactCNN
    takes two thirds of the time.
    """
    return same(x, kernel) if forms.choose("large", x, kernel) == "same" else _by_spectra(x, kernel)


def _by_spectra(x: Array, kernel: Array) -> Array:
    b, h, w, _ = x.shape
    k, _, i, o = kernel.shape
    rows, columns, weights = _fourier(_VALID_PX + k - 1)
    tall, wide = -(-h // _VALID_PX), -(-w // _VALID_PX)
    margins = ((k // 2, k // 2 + n * _VALID_PX - side) for n, side in ((tall, h), (wide, w)))
    tiles = jnp.pad(x.astype(jnp.float32), ((0, 0), *margins, (0, 0)))
    for axis, n in ((1, tall), (3, wide)):
        starts = range(0, n * _VALID_PX, _VALID_PX)
        tiles = jnp.stack([lax.slice_in_dim(tiles, s, s + _VALID_PX + k - 1, axis=axis) for s in starts], axis)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(b * tall * wide, _VALID_PX + k - 1, _VALID_PX + k - 1, i)

    spectra = jnp.einsum("strh,rfw,nhwi->ftnsi", rows, columns, tiles)
    filters = jnp.einsum("strh,rfw,hwio->sftio", rows[..., :k], columns[..., :k], kernel.astype(jnp.float32))
    # Correlation multiplies by the conjugate; the complex product is a real one of twice the channels.
    real, imaginary = filters
    matrix = jnp.concatenate([jnp.concatenate([real, -imaginary], 3), jnp.concatenate([imaginary, real], 3)], 2)
    f, t, n = spectra.shape[:3]
    products = (spectra.reshape(f, t, n, 2 * i) @ matrix).reshape(f, t, n, 2, o)
    # The inverse is the transpose, each pair of conjugate frequencies counted once.
    rows, columns = rows[..., :_VALID_PX], columns[..., :_VALID_PX] * weights
    y = jnp.einsum("strh,rfw,ftnso->nhwo", rows, columns, products)
    y = y.reshape(b, tall, wide, _VALID_PX, _VALID_PX, o).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(b, tall * _VALID_PX, wide * _VALID_PX, o)[:, :h, :w].astype(x.dtype)


def _fourier(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two-dimensional transform of real tiles of an even size, in real numbers.

    First columns `[2, size / 2 + 1, size]` (real and imaginary part, frequency, pixel), then rows
    `[2, size, 2, size]` (part and frequency, part and pixel); weights `[size / 2 + 1, 1]` of the inverse.
    """
    wave = np.exp(-2j * np.pi * np.outer(range(size), range(size)) / size)
    columns = np.stack([wave.real, wave.imag])[:, : size // 2 + 1]
    rows = np.stack([np.stack([wave.real, -wave.imag], 1), np.stack([wave.imag, wave.real], 1)])
    weights = np.full((size // 2 + 1, 1), 2.0 / size**2)
    weights[[0, -1]] /= 2
    return rows.astype(np.float32), columns.astype(np.float32), weights.astype(np.float32)


def narrow(x: Array, kernel: Array) -> Array:
    """`same` of a 3x3 kernel to 16 channels or fewer: `[b, h, w, i]`, `[3, 3, i, o]` -> `[b, h, w, o]`."""
    return same(x, kernel) if forms.choose("narrow", x, kernel) == "same" else _abreast(x, kernel, forms.abreast(x))


def _abreast(x: Array, kernel: Array, n: int) -> Array:
    """`narrow` with n pixels of a row as one: of blocks that begin a pixel earlier, two hold all that n results depend on."""
    b, h, w, i = x.shape
    o = kernel.shape[3]
    x = jnp.pad(x, ((0, 0), (0, 0), (1, n - 1), (0, 0))).reshape(b, h, w // n + 1, n * i)
    shifted = [jnp.pad(kernel, ((0, 0), (q, 2 * n - 3 - q), (0, 0), (0, 0))) for q in range(n)]
    kernel = jnp.stack(shifted, 3).reshape(3, 2, n * i, n * o)
    y = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (0, 0)), dimension_numbers=DIMENSIONS)
    return y.reshape(b, h, w, o)


def space_to_depth(x: Array) -> Array:
    """2x2 blocks into channels: `[b, h, w, c]` -> `[b, h / 2, w / 2, 4 c]`, h and w even."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def depth_to_space(x: Array) -> Array:
    """Inverse of `space_to_depth`: `[b, h, w, 4 c]` -> `[b, 2 h, 2 w, c]`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def halve(x: Array, kernel: Array, bias: Array | None = None, slope: float = 1.0) -> Array:
    """4x4, stride 2, padding 1: `[b, h, w, i]`, `[4, 4, i, o]` -> `[b, h / 2, w / 2, o]`, h and w even.

    Raises:
      ValueError: an odd side, or another kernel size.
    """
    _check(x, kernel, even=True)
    form = forms.choose("halve", x, kernel)
    if form == "native":
        return _native(x, kernel, bias, "halve", slope)
    return _finish(_halve_blocks(x, kernel) if form == "blocks" else _plain_halve(x, kernel), bias, slope)


def _plain_halve(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)


def _halve_blocks(x: Array, kernel: Array) -> Array:
    i, o = kernel.shape[2:]
    blocks = space_to_depth(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    kernel = kernel.reshape(2, 2, 2, 2, i, o).transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * i, o)
    return lax.conv_general_dilated(blocks, kernel, (1, 1), "VALID", dimension_numbers=DIMENSIONS)


def double(x: Array, kernel: Array, bias: Array | None = None, slope: float = 1.0, *, logistic: bool = False) -> Array:
    """`lax.conv_transpose(x, kernel, (2, 2), "SAME")` of a 4x4 kernel: `[b, h, w, i]` -> `[b, 2 h, 2 w, o]`.

    `logistic`: the logistic function of that and the bias, in float32, in place of the leaky ReLU.

    Raises:
      ValueError: another kernel size.
    """
    _check(x, kernel, even=False)
    slope = 1.0 if logistic else slope
    form = forms.choose("double", x, kernel)
    if form == "native" and logistic and kernel.shape[3] == 1:
        return _native_logistic(x, kernel, bias)
    if form == "native":
        y = _native(x, kernel, bias, "double", slope)
    else:
        y = _finish(_plain_double(x, kernel) if form == "plain" else _double_rewritten(x, kernel, form), bias, slope)
    return jax.nn.sigmoid(y.astype(jnp.float32)) if logistic else y


def _plain_double(x: Array, kernel: Array) -> Array:
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=DIMENSIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _double_rewritten(x: Array, kernel: Array, form: str) -> Array:
    return _REWRITTEN[form](x, kernel)


def _double_forward(x: Array, kernel: Array, form: str) -> tuple[Array, tuple[Array, Array]]:
    return _double_rewritten(x, kernel, form), (x, kernel)


def _double_backward(form: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    adjoint = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    # The gradient of the input is a strided convolution.
    if forms.choose("double, gradient of x", x, kernel) == "blocks":
        of_x = _halve_blocks(g, adjoint)
    else:
        (of_x,) = jax.vjp(lambda x: _plain_double(x, kernel), x)[1](g)
    if forms.choose("double, gradient of kernel", x, kernel) == "gradient of halve":
        # Of the strided convolution's 2x2 form XLA knows that it is a filter gradient.
        (of_adjoint,) = jax.vjp(lambda adjoint: _halve_blocks(g, adjoint), adjoint)[1](x)
        return of_x, of_adjoint[::-1, ::-1].transpose(0, 1, 3, 2)
    (of_kernel,) = jax.vjp(lambda kernel: _REWRITTEN[form](x, kernel), kernel)[1](g)
    return of_x, of_kernel


_double_rewritten.defvjp(_double_forward, _double_backward)


def _double_blocks(x: Array, kernel: Array) -> Array:
    """`double` as a 2x2 convolution to blocks of 2x2 output pixels, of which each has another phase first."""
    i, o = kernel.shape[2:]
    # Element 2 t + p belongs to tap t and phase p of the output; a block holds phase 1 of a pixel, then phase 0 of the next.
    kernel = kernel.reshape(2, 2, 2, 2, i, o)[:, ::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, i, 4 * o)
    # Padded by hand: the filter gradient of a convolution that pads more than "SAME" runs on one thread.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    blocks = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=DIMENSIONS)
    return depth_to_space(blocks)[:, 1:-1, 1:-1]


def _double_overlaps(x: Array, kernel: Array) -> Array:
    """`double` as one matrix product to 4x4 output pixels an input pixel, added where they overlap: for few channels."""
    b, h, w, i = x.shape
    o = kernel.shape[3]
    # Blocks of 2x2 output pixels, by their row and column among the four blocks that an input pixel touches.
    matrix = kernel[::-1, ::-1].reshape(2, 2, 2, 2, i, o).transpose(4, 0, 2, 1, 3, 5).reshape(i, 16 * o)
    blocks = (x.reshape(-1, i) @ matrix).reshape(b, h, w, 2, 2, 4 * o)
    total = jnp.zeros((b, h + 1, w + 1, 4 * o), blocks.dtype)
    for row in range(2):
        for column in range(2):
            total += jnp.pad(blocks[:, :, :, row, column], ((0, 0), (row, 1 - row), (column, 1 - column), (0, 0)))
    return depth_to_space(total)[:, 1:-1, 1:-1]


_REWRITTEN = {"blocks": _double_blocks, "overlaps": _double_overlaps}


def channel_sum(x: Array) -> Array:
    """Sum over all axes but the last: `[b, h, w, c]` -> `[c]`."""
    if forms.choose("channel_sum", x) == "plain":
        return x.sum((0, 1, 2))
    # The barrier keeps the compiler from making one sum of both again.
    return lax.optimization_barrier(x.reshape(-1, forms.PARTIAL_SUM, x.shape[3]).sum(1)).sum(0)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """`[b, h, w, c]` + `[1, 1, 1, c]`, with the bias's gradient by `channel_sum`."""
    return x + bias


add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, g: (g, channel_sum(g).reshape(1, 1, 1, -1)))


def _check(x: Array, kernel: Array, even: bool) -> None:
    if kernel.shape[:2] != (4, 4) or (even and (x.shape[1] % 2 or x.shape[2] % 2)):
        raise ValueError(f"a 4x4 kernel and even sides are needed, not a kernel {kernel.shape} on {x.shape}")
