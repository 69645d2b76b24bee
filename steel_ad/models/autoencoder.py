"""Convolutional autoencoder of Bergmann et al. 2018 as the thesis uses it (SPEC section 4)."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from steel_ad.models import layers


class Autoencoder(nn.Module):
    """Reconstructs a patch through a code of `latent` numbers.

    `[b, p, p, 1]` in [0, 1] -> `[b, p, p, 1]` float32 in (0, 1); p a multiple of 16, the bottleneck's kernel is p / 16.
    Leaky ReLU 0.2 after each layer, but the code is linear and the output a sigmoid. 1,048,549 parameters at p = 128 and
    latent = 100. Parameters are float32, arithmetic is `dtype`.

    Raises:
      ValueError: a patch that is not square, or a side that is no multiple of 16.
    """

    latent: int = 100
    dtype: jnp.dtype = jnp.float32

    # Layers of the encoder that `ops.sliding.heads` can share between overlapping patches.
    head: ClassVar[int] = 2

    @nn.compact
    def __call__(self, x: Array, first: int = 0, last: int | None = None) -> Array:
        """Layers `first` to `last` - 1 of the encoder, or to the network's end: x is what the layer before made of patches."""
        if not first and last is None and (x.shape[1] != x.shape[2] or x.shape[1] % 16):
            raise ValueError(f"patches must be square with a side that is a multiple of 16, not {x.shape[1:3]}")
        halve = functools.partial(layers.Halve, slope=0.2, dtype=self.dtype)
        double = functools.partial(layers.Double, slope=0.2, dtype=self.dtype)
        same = functools.partial(layers.Same, slope=0.2, dtype=self.dtype)
        encoder = (halve(32), halve(32), same(32), halve(64), same(64), halve(128), same(64), same(32))
        for layer in encoder[first:last]:
            x = layer(x)
        if last is not None:
            return x
        side = x.shape[1]
        x = layers.Collapse(self.latent, dtype=self.dtype)(x)
        x = nn.leaky_relu(layers.Expand(32, side, dtype=self.dtype)(x), 0.2)
        for layer in (  # type: ignore[assignment]
            same(64),
            same(128),
            double(64),
            same(64),
            double(32),
            same(32),
            double(32),
        ):
            x = layer(x)
        return double(1, slope=1.0, gain=1.0, logistic=True)(x)
