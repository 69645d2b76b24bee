"""Layers over `ops.convolution`, with the plain parameter layout of a Conv or ConvTranspose: `kernel` and `bias`.

`slope` is that of a leaky ReLU applied to a layer's result; 1: it is linear.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from steel_ad.models import initial
from steel_ad.ops import convolution


class Halve(nn.Module):
    """4x4 convolution of stride 2: `[b, h, w, i]` -> `[b, h / 2, w / 2, features]`."""

    features: int
    slope: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = _parameters(self, (4, 4, x.shape[-1], self.features), fan_in=16 * x.shape[-1])
        return convolution.halve(x.astype(self.dtype), kernel, bias, self.slope)


class Double(nn.Module):
    """4x4 transposed convolution of stride 2: `[b, h, w, i]` -> `[b, 2 h, 2 w, features]`; with `logistic` in (0, 1), float32."""

    features: int
    slope: float = 1.0
    gain: float = 2.0
    logistic: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # An output pixel meets 4 of the 16 kernel elements.
        kernel, bias = _parameters(self, (4, 4, x.shape[-1], self.features), 4 * x.shape[-1], self.gain)
        return convolution.double(x.astype(self.dtype), kernel, bias, self.slope, logistic=self.logistic)


class Same(nn.Module):
    """3x3 convolution of stride 1: `[b, h, w, i]` -> `[b, h, w, features]`."""

    features: int
    slope: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = _parameters(self, (3, 3, x.shape[-1], self.features), fan_in=9 * x.shape[-1])
        return convolution.same(x.astype(self.dtype), kernel, bias, self.slope)


class Collapse(nn.Module):
    """Convolution as large as its input, "VALID": `[b, k, k, i]` -> `[b, 1, 1, features]`; kernel `[k, k, i, features]`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, k, _, i = x.shape
        kernel, bias = _parameters(self, (k, k, i, self.features), fan_in=k * k * i, gain=1.0)
        y = x.astype(self.dtype).reshape(b, -1) @ kernel.reshape(-1, self.features)
        return y.reshape(b, 1, 1, self.features) + bias


class Expand(nn.Module):
    """`lax.conv_transpose` of one pixel, "VALID": `[b, 1, 1, i]` -> `[b, k, k, features]`; kernel `[k, k, i, features]`."""

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, _, _, i = x.shape
        kernel, bias = _parameters(self, (self.size, self.size, i, self.features), fan_in=i)
        # The unflipped transposed convolution of one pixel lays the kernel down mirrored.
        matrix = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(i, -1)
        return (x.astype(self.dtype).reshape(b, i) @ matrix).reshape(b, self.size, self.size, self.features) + bias


def _parameters(module: nn.Module, shape: tuple[int, ...], fan_in: int, gain: float = 2.0) -> tuple[Array, Array]:
    """Kernel `shape`, normal with variance gain / fan_in (He et al. 2015 for gain 2), and bias `[1, 1, 1, o]`, in the module's dtype."""
    kernel = initial.parameter(module, "kernel", initial.normal((gain / fan_in) ** 0.5), shape)
    bias = initial.parameter(module, "bias", initializers.zeros, (shape[-1],))
    return kernel.astype(module.dtype), bias.astype(module.dtype).reshape(1, 1, 1, -1)
