"""U-Net of Ronneberger et al. 2015 with batch norm and padded convolutions, full resolution (SPEC section 2)."""

from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from steel_ad.models import layers
from steel_ad.ops import convolution, resampling


class Upsample(nn.Module):
    """`[b, h, w, i]` -> `[b, 2 h, 2 w, features]`, linear.

    "learned" is a 2x2 transposed convolution of stride 2, "nearest" repetition and a 3x3 convolution.
    """

    features: int
    kind: Literal["learned", "nearest"] = "learned"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        if self.kind == "nearest":
            kernel, bias = layers.parameters(self, (3, 3, x.shape[-1], self.features), self.dtype, gain=1.0)
            return convolution.same(resampling.repeat(x), kernel, bias)
        i = x.shape[-1]  # an output pixel meets one of the four kernel elements
        kernel, bias = layers.parameters(self, (2, 2, i, self.features), self.dtype, fan_in=i, gain=1.0)
        return convolution.add_bias(resampling.transpose_2x2(x, kernel), bias)


class UNet(nn.Module):
    """`[b, h, w, 1]` float32 in [0, 1] -> features `[b, h, w, width]` and logits `[b, h, w, 1]`, float32.

    The map is tanh of the logits; features are not negative. Five contracting blocks of two 3x3 convolutions with
    batch norm and ReLU (width to 16 width features), four expanding ones behind 2x2 upsampling (see `Upsample`) and
    skip concatenation, and a 1x1 convolution. 31,042,369 parameters at width 64 with learned upsampling. Parameters
    are float32, arithmetic is `dtype`. Apply with `train=True` and `mutable=["batch_stats"]` to train, with neither to
    predict.

    Raises:
      ValueError: a side that is no multiple of 16, or an unknown kind of upsampling.
    """

    width: int = 64
    upsampling: Literal["learned", "nearest"] = "learned"
    dtype: jnp.dtype = jnp.float32

    # An exported program takes images of any sides that are multiples of it.
    side_multiple: ClassVar[int] = 16

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        if x.shape[1] % 16 or x.shape[2] % 16:
            raise ValueError(f"both sides of an image must be multiples of 16, not {x.shape[1:3]}")
        if self.upsampling not in ("learned", "nearest"):
            raise ValueError(f"upsampling is 'learned' or 'nearest', not {self.upsampling!r}")
        *contracting, bottom = (self.width * 2**n for n in range(5))
        skips = []
        for features in contracting:
            for _ in range(2):
                x = layers.ConvNormRelu(features, dtype=self.dtype)(x, train)
            skips.append(x)
            x = resampling.max_pool(x)
        for _ in range(2):
            x = layers.ConvNormRelu(bottom, dtype=self.dtype)(x, train)
        for features, skip in zip(contracting[::-1], skips[::-1], strict=True):
            x = Upsample(features, self.upsampling, dtype=self.dtype)(x)
            x = jnp.concatenate([skip, x], -1)
            for _ in range(2):
                x = layers.ConvNormRelu(features, dtype=self.dtype)(x, train)
        x = x.astype(jnp.float32)
        return x, layers.ToMap()(x)
