"""Random changes of light, camera and focus, so that a network's decision survives a new coil."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from steel_ad.ops.filters import gaussian_mean

# Largest changes at strength 1.
_GAIN = 0.3  # natural logarithm of the gain
_GAMMA = 0.25  # natural logarithm of the exponent
_OFFSET = 0.06  # grey levels
_SLOPE = 0.2  # change of the gain from the middle of a patch to its side
_CURVE = 0.1  # the same, as a parabola
_BLUR = 0.8  # weight of the picture out of focus
_BLUR_PX = 1.0  # its spread
_NOISE = 0.012  # standard deviation of the noise, grey levels
_NUMBERS = 9  # that a patch takes


def changed(key: Array, images: Array, *, strength: float) -> Array:
    """Patches float32 `[b, p, p]` in [0, 1] in other light, each in its own way; pure and jittable.

    A patch has its own gain, offset, gamma, slope and curve of the light across it, focus and noise.

    Args:
      strength: factor on all changes; 0 changes nothing.
    """
    b, p, _ = images.shape
    of_patch, of_noise = jax.random.split(key)
    u = strength * jax.random.uniform(of_patch, (_NUMBERS, b, 1, 1), minval=-1.0)
    at = jnp.linspace(-1.0, 1.0, p)
    y, x = at[None, :, None], at[None, None, :]
    lamp = 1 + _SLOPE * (u[0] * y + u[1] * x) + _CURVE * (u[2] * y**2 + u[3] * x**2)
    blur = jnp.clip(_BLUR * u[4], 0, 1)  # half of the patches stay in focus
    images = images + blur * (gaussian_mean(images, _BLUR_PX) - images)
    images = jnp.maximum(images, 1e-4) ** jnp.exp(_GAMMA * u[5])
    images = images * jnp.exp(_GAIN * u[6]) * lamp + _OFFSET * u[7]
    return jnp.clip(images + _NOISE * u[8] * _noise(of_noise, b, p), 0, 1)


def _noise(key: Array, b: int, p: int) -> Array:
    """Noise `[b, p, p]` of unit variance: windows of one field, since random numbers are slow on CPU."""
    of_field, of_place = jax.random.split(key)
    field = jax.random.normal(of_field, (2 * p, 2 * p))
    return jax.vmap(lambda at: lax.dynamic_slice(field, at, (p, p)))(jax.random.randint(of_place, (b, 2), 0, p + 1))
