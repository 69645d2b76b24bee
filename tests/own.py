"""What a user may write outside of the project: a detector, networks and a loss, named as `tests.own:NAME`."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from steel_ad.detectors import Detector


class Deviation(Detector):
    """Distance of a pixel from the mean grey of good plates."""

    name = "deviation"

    def fit(self, images):
        return {"mean": np.float32(np.mean([image.mean() for image in images]) / 255)}

    def residual(self, state, image):
        return jnp.abs(image - state["mean"])


class Mirror(nn.Module):
    """An autoencoder of one dense layer over the rows of a patch."""

    latent: int = 4

    @nn.compact
    def __call__(self, x):
        code = nn.Dense(self.latent)(x[..., 0])
        return nn.sigmoid(nn.Dense(x.shape[2])(code))[..., None]


class Edges(nn.Module):
    """A segmentation network of one convolution."""

    width: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        features = nn.relu(nn.Conv(self.width, (3, 3))(x))
        return features, nn.Conv(1, (1, 1))(features)


def halves(reconstruction, target, *, share=0.5):
    return share * jnp.mean(jnp.abs(reconstruction - target), axis=(1, 2, 3))
