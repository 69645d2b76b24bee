"""Layers of all networks, over the operations of `ops`, with the plain parameter layout of a Conv or ConvTranspose: `kernel` and `bias`.

Parameters are float32, arithmetic is `dtype`. `slope` is that of a leaky ReLU applied to a layer's result; 1: it is linear.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from jax import Array, lax
from jax.nn import initializers

from steel_ad.ops import convolution, normalisation


class Halve(nn.Module):
    """4x4 convolution of stride 2: `[b, h, w, i]` -> `[b, h / 2, w / 2, features]`."""

    features: int
    slope: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = parameters(self, (4, 4, x.shape[-1], self.features), self.dtype)
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
        i = x.shape[-1]  # an output pixel meets 4 of the 16 kernel elements
        kernel, bias = parameters(self, (4, 4, i, self.features), self.dtype, fan_in=4 * i, gain=self.gain)
        return convolution.double(x.astype(self.dtype), kernel, bias, self.slope, logistic=self.logistic)


class Same(nn.Module):
    """3x3 convolution of stride 1: `[b, h, w, i]` -> `[b, h, w, features]`."""

    features: int
    slope: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = parameters(self, (3, 3, x.shape[-1], self.features), self.dtype)
        return convolution.same(x.astype(self.dtype), kernel, bias, self.slope)


class Collapse(nn.Module):
    """Convolution as large as its input, "VALID": `[b, k, k, i]` -> `[b, 1, 1, features]`; kernel `[k, k, i, features]`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, k, _, i = x.shape
        kernel, bias = parameters(self, (k, k, i, self.features), self.dtype, gain=1.0)
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
        kernel, bias = parameters(self, (self.size, self.size, i, self.features), self.dtype, fan_in=i)
        # The unflipped transposed convolution of one pixel lays the kernel down mirrored.
        matrix = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(i, -1)
        return (x.astype(self.dtype).reshape(b, i) @ matrix).reshape(b, self.size, self.size, self.features) + bias


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
        scale = _parameter(self, "scale", initializers.ones, shape)
        bias = _parameter(self, "bias", initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        x = x.astype(jnp.float32)
        if not train:
            mean = running_mean.value - offset.astype(jnp.float32).reshape(shape)
            return normalisation.by_statistics(x, mean, running_var.value, scale, bias).astype(self.dtype)
        x, mean, var = normalisation.by_batch(x, scale, bias)
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
            x = convolution.large(x, kernel)
        elif self.size == 3 and self.stride == 1 and self.features <= 16:
            x = convolution.narrow(x, kernel)
        elif self.stride == 1:
            x = convolution.same(x, kernel)
        else:
            strides = (self.stride, self.stride)
            x = lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=convolution.DIMENSIONS)
        return nn.relu(BatchNorm(dtype=self.dtype)(x, bias, train))


class ToMap(nn.Module):
    """1x1 convolution to one map, the logits of a segmentation, in float32: `[b, h, w, i]` -> `[b, h, w, 1]`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = parameters(self, (1, 1, x.shape[-1], 1), jnp.float32, gain=1.0)
        return convolution.add_bias(x @ kernel[0, 0], bias)


def parameters(
    module: nn.Module, shape: tuple[int, int, int, int], dtype: jnp.dtype, *, fan_in: int = 0, gain: float = 2.0
) -> tuple[Array, Array]:
    """A convolution's kernel `shape`, `[kh, kw, i, o]`, and bias `[1, 1, 1, o]`, as `dtype`.

    The kernel is normal with variance gain / fan_in (He et al. 2015 for gain 2), the bias 0.

    Args:
      fan_in: products that an output pixel sums; 0: kh kw i, those of a convolution.
    """
    variance = gain / (fan_in or math.prod(shape[:3]))
    kernel = _parameter(module, "kernel", normal(variance**0.5), shape)
    bias = _parameter(module, "bias", initializers.zeros, (shape[-1],))
    return kernel.astype(dtype), bias.astype(dtype).reshape(1, 1, 1, -1)


def normal(stddev: float) -> initializers.Initializer:
    """`jax.nn.initializers.normal`, drawn as one row of numbers: the same ones, which XLA compiles in a quarter of the time."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape) * jnp.array(stddev, dtype)

    return init


def _parameter(module: nn.Module, name: str, init: initializers.Initializer, shape: tuple[int, ...]) -> Array:
    """`module.param`, float32, which traces `init` only where it is needed: flax else does so at every use, for its shape.

    Raises:
      flax.errors.ScopeParamShapeError: there is one of another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value: Array = module.get_variable("params", name)
    if value.shape != shape:
        raise errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value
