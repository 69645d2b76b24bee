"""The autoencoder's convolutions, exact, in the form that the backend runs fast.

XLA's CPU backend is slow on strided and on dilated convolutions and on their gradients, and cuDNN on those of one channel. A
4x4 convolution of stride 2 is a 2x2 one over 2x2 blocks of its input; its transpose is a 2x2 one to 2x2 blocks of its output: on
CPU and GPU a step of the autoencoder takes little more than half of the time. Where `steel_ad.native` is ready, its
compiled form is faster still. Other accelerators get the plain form.
Kernels are always laid out `[kh, kw, in, out]` as `lax.conv_general_dilated` and `lax.conv_transpose` take them. Where a
bias `[1, 1, 1, out]` and the slope of a leaky ReLU (or `logistic`) are given, they are applied to the result.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from steel_ad import native

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def cpu_compiler_options() -> dict[str, str] | None:
    """Options for the outermost `jax.jit`: on CPU they keep VALID convolutions off a single-threaded library path."""
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if _on_cpu() and _knows_ynn() else None


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


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _rewrite(form: str | None) -> bool:
    if form is None:
        return jax.default_backend() in ("cpu", "gpu")
    if form not in ("plain", "rewritten"):
        raise ValueError(f"form is 'plain', 'rewritten' or None (the backend's faster one), not {form!r}")
    return form == "rewritten"


def same(x: Array, kernel: Array, bias: Array | None = None, slope: float = 1.0) -> Array:
    """Stride 1, "SAME" padding: `[b, h, w, i]`, `[k, k, i, o]` -> `[b, h, w, o]`."""
    height, width = kernel.shape[:2]
    if height == width and height % 2 and native.ready(x, kernel):
        return _native(x, kernel, bias, "same", slope)
    return _finish(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS), bias, slope)


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


def space_to_depth(x: Array) -> Array:
    """2x2 blocks into channels: `[b, h, w, c]` -> `[b, h / 2, w / 2, 4 c]`, h and w even."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def depth_to_space(x: Array) -> Array:
    """Inverse of `space_to_depth`: `[b, h, w, 4 c]` -> `[b, 2 h, 2 w, c]`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def halve(x: Array, kernel: Array, bias: Array | None = None, slope: float = 1.0, *, form: str | None = None) -> Array:
    """4x4, stride 2, padding 1: `[b, h, w, i]`, `[4, 4, i, o]` -> `[b, h / 2, w / 2, o]`, h and w even.

    Raises:
      ValueError: an odd side, another kernel size, or an unknown form.
    """
    _check(x, kernel, even=True)
    if form is None and native.ready(x, kernel):
        return _native(x, kernel, bias, "halve", slope)
    if not _rewrite(form):
        y = lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=_DIMENSIONS)
        return _finish(y, bias, slope)
    i, o = kernel.shape[2:]
    blocks = space_to_depth(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    kernel = kernel.reshape(2, 2, 2, 2, i, o).transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * i, o)
    y = lax.conv_general_dilated(blocks, kernel, (1, 1), "VALID", dimension_numbers=_DIMENSIONS)
    return _finish(y, bias, slope)


def double(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    slope: float = 1.0,
    *,
    logistic: bool = False,
    form: str | None = None,
) -> Array:
    """`lax.conv_transpose(x, kernel, (2, 2), "SAME")` of a 4x4 kernel: `[b, h, w, i]` -> `[b, 2 h, 2 w, o]`.

    `logistic`: the logistic function of that and the bias, in float32, in place of the leaky ReLU.

    Raises:
      ValueError: another kernel size, or an unknown form.
    """
    _check(x, kernel, even=False)
    if form is None and native.ready(x, kernel):
        if logistic and kernel.shape[3] == 1:
            return _native_logistic(x, kernel, bias)
        y = _native(x, kernel, bias, "double", 1.0 if logistic else slope)
    else:
        y = _double_rewritten(x, kernel) if _rewrite(form) else _plain_double(x, kernel)
        y = _finish(y, bias, 1.0 if logistic else slope)
    return jax.nn.sigmoid(y.astype(jnp.float32)) if logistic else y


def _plain_double(x: Array, kernel: Array) -> Array:
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=_DIMENSIONS)


@jax.custom_vjp
def _double_rewritten(x: Array, kernel: Array) -> Array:
    return _linear_form(kernel)(x, kernel)


def _double_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _double_rewritten(x, kernel), (x, kernel)


def _double_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # The gradient of the input is a strided convolution, which is fast as it is (on a GPU not with one channel); that of the
    # kernel is not.
    x, kernel = saved
    one_channel, on_gpu = kernel.shape[3] == 1, jax.default_backend() == "gpu"
    adjoint = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    if on_gpu and one_channel:
        of_x = halve(g, adjoint, form="rewritten")
    else:
        (of_x,) = jax.vjp(lambda x: _plain_double(x, kernel), x)[1](g)
    if on_gpu and not one_channel:
        # XLA knows the filter gradient of the strided convolution's 2x2 form as one, and asks cuDNN for this one's as for a
        # convolution with a kernel as large as the image.
        (of_adjoint,) = jax.vjp(lambda adjoint: halve(g, adjoint, form="rewritten"), adjoint)[1](x)
        return of_x, of_adjoint[::-1, ::-1].transpose(0, 1, 3, 2)
    (of_kernel,) = jax.vjp(lambda kernel: _linear_form(kernel)(x, kernel), kernel)[1](g)
    return of_x, of_kernel


_double_rewritten.defvjp(_double_forward, _double_backward)


def _linear_form(kernel: Array):
    return _overlap_add if kernel.shape[3] == 1 else _to_blocks


def _to_blocks(x: Array, kernel: Array) -> Array:
    """`double` as a 2x2 convolution to blocks of 2x2 output pixels, of which each has another phase first."""
    i, o = kernel.shape[2:]
    # Element 2 t + p belongs to tap t and phase p of the output; a block holds phase 1 of a pixel, then phase 0 of the next.
    kernel = kernel.reshape(2, 2, 2, 2, i, o)[:, ::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, i, 4 * o)
    # Padded by hand: the filter gradient of a convolution that pads more than "SAME" runs on one thread.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    blocks = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=_DIMENSIONS)
    return depth_to_space(blocks)[:, 1:-1, 1:-1]


def _overlap_add(x: Array, kernel: Array) -> Array:
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


def channel_sum(x: Array) -> Array:
    """Sum over all axes but the last: `[b, h, w, c]` -> `[c]`.

    Of a sum over more than 32 elements XLA's CPU compiler makes a reduce-window, which it does not fuse with what it sums.
    """
    if not _on_cpu() or x.shape[2] % 16:
        return x.sum((0, 1, 2))
    # The barrier keeps the compiler from making one sum of both again.
    return lax.optimization_barrier(x.reshape(-1, 16, x.shape[3]).sum(1)).sum(0)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """`[b, h, w, c]` + `[1, 1, 1, c]`, with the bias's gradient by `channel_sum`."""
    return x + bias


add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, g: (g, channel_sum(g).reshape(1, 1, 1, -1)))


def _check(x: Array, kernel: Array, even: bool) -> None:
    if kernel.shape[:2] != (4, 4) or (even and (x.shape[1] % 2 or x.shape[2] % 2)):
        raise ValueError(f"a 4x4 kernel and even sides are needed, not a kernel {kernel.shape} on {x.shape}")
