"""CompactCNN of Racki et al. 2018: a segmentation network, and a classifier of images behind it or the U-Net (SPEC section 2)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from steel_ad.models import layers


class Segmenter(nn.Module):
    """`[b, h, w, 1]` float32 in [0, 1] -> features `[b, h / 4, w / 4, 128]` and logits `[b, h / 4, w / 4, 1]`, float32.

    The map is tanh of the logits; features are not negative. Nine convolutions in three blocks, each with batch norm
    and ReLU, and a tenth to the map; 1,124,225 parameters. Parameters are float32, arithmetic is `dtype`. Apply with
    `train=True` and `mutable=["batch_stats"]` to train, with neither to predict.

    Raises:
      ValueError: a side that is no multiple of 4.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        if x.shape[1] % 4 or x.shape[2] % 4:
            raise ValueError(f"both sides of an image must be multiples of 4, not {x.shape[1:3]}")
        for features, size, stride in ((32, 11, 2), (64, 7, 2), (128, 3, 1)):
            for s in (stride, 1, 1):
                x = layers.ConvNormRelu(features, size, s, dtype=self.dtype)(x, train)
        x = x.astype(jnp.float32)
        return x, layers.ToMap()(x)


class Classifier(nn.Module):
    """Features `[b, h, w, c]` and map `[b, h, w, 1]` of either segmentation network, float32 -> logit `[b]` float32.

    The score is sigmoid of the logit. A 1x1 convolution to 32 maps with batch norm and ReLU; maximum and mean of each
    of them and of the map; one dense unit. 4,259 parameters for 128 features: with the segmentation stage 1,128,484.
    Parameters are float32, arithmetic is `dtype`. Apply as `Segmenter`.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, segmentation: Array, train: bool = False) -> Array:
        maps = layers.ConvNormRelu(32, 1, dtype=self.dtype)(features, train).astype(jnp.float32)
        pooled = [_maximum(m) for m in (maps, segmentation)] + [m.mean((1, 2)) for m in (maps, segmentation)]
        dense = nn.Dense(1, kernel_init=nn.initializers.lecun_normal())
        return dense(jnp.concatenate(pooled, -1))[:, 0]


def _maximum(x: Array) -> Array:
    """Largest value of each map: `[b, h, w, c]` -> `[b, c]`.

    By its place: the gradient of `jnp.max` looks for elements equal to the maximum, and finds none (0 / 0) where the compiler
    computed x a second time and rounded otherwise.
    """
    x = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.take_along_axis(x, jnp.argmax(x, axis=1, keepdims=True), axis=1)[:, 0]
