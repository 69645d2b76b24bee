"""Layers of the supervised networks: convolutions in the form that the backend runs fast, batch norm, 2x2 pooling and upsampling.

Every rewritten operation is exact up to rounding, and parameters keep the layout of a plain kernel, `[kh, kw, in, out]`. XLA's CPU
backend is slow on dilated convolutions and on the gradient of window maxima and has no fast form of large kernels; cuDNN is slow
on few channels, and XLA asks it for upsampling's filter gradient in a slow way. Other accelerators get the plain forms.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from steel_ad import native
from steel_ad.models import initial
from steel_ad.ops import convolution

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


_DIRECT = (
    7  # largest kernel of which the compiled form is faster: 1.5 times at 7x7, as fast at 11x11, but not its gradients
)
_VALID_PX = 22  # output pixels of a tile: 32 is 10 % faster at 11x11, but 60 % slower at 7x7


def large(x: Array, kernel: Array) -> Array:
    """`convolution.same` of a kernel of 7x7 or more, k odd: `[b, h, w, i]`, `[k, k, i, o]` -> `[b, h, w, o]`, x's dtype.

    On CPU a product of spectra of overlapping tiles, in float32 and to 1e-6 of the largest value: a step of CompactCNN
    takes two thirds of the time.
    """
    b, h, w, _ = x.shape
    k, _, i, o = kernel.shape
    if not _on_cpu() or (k <= _DIRECT and native.ready(x, kernel)):
        return convolution.same(x, kernel)
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


# Pixels of a row that become channels together on a GPU, whose convolutions of 1 or 16 channels take three times as long as
# of the same work at 32 channels.
_ABREAST, _ABREAST_OF_IMAGES = 4, 8


def narrow(x: Array, kernel: Array) -> Array:
    """`convolution.same` of a 3x3 kernel to 16 channels or fewer: `[b, h, w, i]`, `[3, 3, i, o]` -> `[b, h, w, o]`."""
    abreast = _ABREAST_OF_IMAGES if x.shape[3] == 1 else _ABREAST
    if jax.default_backend() != "gpu" or x.shape[2] % abreast:
        return convolution.same(x, kernel)
    return _abreast(x, kernel, abreast)


def _abreast(x: Array, kernel: Array, n: int) -> Array:
    """`narrow` with n pixels of a row as one: of blocks that begin a pixel earlier, two hold all that n results depend on."""
    b, h, w, i = x.shape
    o = kernel.shape[3]
    x = jnp.pad(x, ((0, 0), (0, 0), (1, n - 1), (0, 0))).reshape(b, h, w // n + 1, n * i)
    shifted = [jnp.pad(kernel, ((0, 0), (q, 2 * n - 3 - q), (0, 0), (0, 0))) for q in range(n)]
    kernel = jnp.stack(shifted, 3).reshape(3, 2, n * i, n * o)
    y = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (0, 0)), dimension_numbers=_DIMENSIONS)
    return y.reshape(b, h, w, o)


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


def double(x: Array, kernel: Array) -> Array:
    """`lax.conv_transpose(x, kernel, (2, 2), "VALID")` of a 2x2 kernel: `[b, h, w, i]` -> `[b, 2 h, 2 w, o]`.

    XLA gives cuDNN the plain form's filter gradient as a convolution with a kernel as large as the image: with four of them a step
    of the U-Net took 2.6 times as long.
    """
    return _double_by_products(x, kernel) if jax.default_backend() in ("cpu", "gpu") else _plain_double(x, kernel)


def _plain_double(x: Array, kernel: Array) -> Array:
    return lax.conv_transpose(x, kernel, (2, 2), "VALID", dimension_numbers=_DIMENSIONS)


@jax.custom_vjp
def _double_by_products(x: Array, kernel: Array) -> Array:
    i, o = kernel.shape[2:]
    # The unflipped transposed convolution lays the kernel down mirrored.
    return convolution.depth_to_space(x @ kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(i, 4 * o))


def _double_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _double_by_products(x, kernel), (x, kernel)


def _double_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # The gradient of the input is a strided convolution, which needs no copy of g in another order.
    x, kernel = saved
    i, o = kernel.shape[2:]
    (of_x,) = jax.vjp(lambda x: _plain_double(x, kernel), x)[1](g)
    product = x.reshape(-1, i).T @ convolution.space_to_depth(g).reshape(-1, 4 * o)
    return of_x, product.reshape(i, 2, 2, o).transpose(1, 2, 0, 3)[::-1, ::-1]


_double_by_products.defvjp(_double_forward, _double_backward)


def max_pool(x: Array) -> Array:
    """Maximum of each 2x2 block: `[b, h, w, c]` -> `[b, h / 2, w / 2, c]`, h and w even.

    On CPU and GPU equal maxima share the gradient, elsewhere one of them takes it; after a ReLU most ties are zeros, which pass
    none on.
    """
    if jax.default_backend() not in ("cpu", "gpu"):
        return nn.max_pool(x, (2, 2), (2, 2))
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def repeat(x: Array) -> Array:
    """Each pixel as a 2x2 block: `[b, h, w, c]` -> `[b, 2 h, 2 w, c]`."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


@jax.custom_vjp
def _normalise(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """`[b, h, w, c]` float32 by its own mean and biased variance, both `[c]`, which are returned too and take no gradient."""
    return _normalise_forward(x, scale, bias)[0]


def _normalise_forward(x: Array, scale: Array, bias: Array):
    count = x.size // x.shape[-1]
    mean = convolution.channel_sum(x) / count
    var = jnp.maximum(convolution.channel_sum(x * x) / count - mean * mean, 0.0)
    inverse = lax.rsqrt(var + _EPSILON)
    slope = scale * inverse
    return (x * _row(slope) + _row(bias - mean * slope), mean, var), (x, scale, mean, inverse)


def _normalise_backward(saved: tuple[Array, Array, Array, Array], gradients: tuple[Array, Array, Array]):
    x, scale, mean, inverse = saved
    g, count = gradients[0], x.size // x.shape[-1]
    of_bias = convolution.channel_sum(g)
    of_scale = inverse * (convolution.channel_sum(g * x) - mean * of_bias)
    # dx = slope (g - mean(g) - normalised x * mean(g * normalised x))
    slope, share = scale * inverse, inverse * of_scale / count
    of_x = g * _row(slope) - x * _row(slope * share) + _row(slope * (mean * share - of_bias / count))
    return of_x, of_scale, of_bias


_normalise.defvjp(_normalise_forward, _normalise_backward)

_EPSILON = 1e-5


def _row(a: Array) -> Array:
    return a.reshape(1, 1, 1, -1)


class BatchNorm(nn.Module):
    """Normalises `x + offset` over all axes but the last; scale and bias in "params", mean and var in "batch_stats".

    x is `[b, h, w, c]`, offset the convolution's bias `[1, 1, 1, c]`, arithmetic float32, the result `dtype`. With
    `train` by the batch's mean and biased variance, which also enter the running ones (momentum 0.9, float32);
    otherwise by those. The batch's mean takes an offset out again, so its gradient is exactly zero in training.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, offset: Array, train: bool) -> Array:
        shape = (x.shape[-1],)
        scale = initial.parameter(self, "scale", initializers.ones, shape)
        bias = initial.parameter(self, "bias", initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        x = x.astype(jnp.float32)
        if not train:
            slope = scale * lax.rsqrt(running_var.value + _EPSILON)
            mean = running_mean.value - offset.astype(jnp.float32).reshape(shape)
            return (x * _row(slope) + _row(bias - mean * slope)).astype(self.dtype)
        x, mean, var = _normalise(x, scale, bias)
        if not self.is_initializing():
            running_mean.value = 0.9 * running_mean.value + 0.1 * (mean + offset.astype(jnp.float32).reshape(shape))
            running_var.value = 0.9 * running_var.value + 0.1 * var
        return x.astype(self.dtype)


class ConvNormRelu(nn.Module):
    """k x k convolution, "SAME", batch norm, ReLU: `[b, h, w, i]` -> `[b, h / stride, w / stride, features]`, stride 1 or 2."""

    features: int
    size: int = 3
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        kernel, bias = parameters(self, (self.size, self.size, x.shape[-1], self.features), self.dtype)
        x = x.astype(self.dtype)
        if self.size == 1:
            x = x @ kernel[0, 0]
        elif self.size >= 7 and self.stride == 1:
            x = large(x, kernel)
        elif self.size == 3 and self.stride == 1 and self.features <= 16:
            x = narrow(x, kernel)
        elif self.stride == 1:
            x = convolution.same(x, kernel)
        else:
            strides = (self.stride, self.stride)
            x = lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=_DIMENSIONS)
        return nn.relu(BatchNorm(dtype=self.dtype)(x, bias, train))


class ToMap(nn.Module):
    """1x1 convolution to one map, the logits of a segmentation, in float32: `[b, h, w, i]` -> `[b, h, w, 1]`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = parameters(self, (1, 1, x.shape[-1], 1), jnp.float32, gain=1.0)
        return convolution.add_bias(x @ kernel[0, 0], bias)


def parameters(
    module: nn.Module, shape: tuple[int, int, int, int], dtype: jnp.dtype, gain: float = 2.0
) -> tuple[Array, Array]:
    """Kernel `shape`, normal with variance gain / fan-in (He et al. 2015 for gain 2), and bias `[1, 1, 1, o]`, as `dtype`."""
    fan_in = shape[0] * shape[1] * shape[2]
    kernel = initial.parameter(module, "kernel", initial.normal((gain / fan_in) ** 0.5), shape)
    bias = initial.parameter(module, "bias", initializers.zeros, (shape[-1],))
    return kernel.astype(dtype), bias.astype(dtype).reshape(1, 1, 1, -1)
