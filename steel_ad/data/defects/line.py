"""Alters good plates by their own line, so that a network learns from good plates alone.

An alteration is a spot of irregular outline with soft edges, from a round one to a thin scratch. In it the plate gets a piece of
another good plate at another phase of the pattern (CutPaste, Li et al. 2021; natural synthetic anomalies, Schlueter et al. 2022), or
loses its pattern, or becomes brighter or darker, or several of these. Strengths are relative to the contrast of the plate around, and
only what stands out against the plate's grain and pattern is labelled, since a line's plates differ from each other too.
"""

import jax
import jax.numpy as jnp
from jax import Array

from steel_ad.ops.filters import gaussian_mean

_LENGTH_PX = (5.0, 90.0)  # of a spot; also at most 0.7 sides of the patch
_SLENDER = 25.0  # largest ratio of length to width
_WIDTH_PX = 1.5  # least width
_ALONG = 0.5  # share of spots that lie along the strip, within _TILT
_TILT = 0.12  # radians
_SOFT_PX = (0.7, 4.0)  # width of the edge
# Cumulated shares of what a spot is made of: the plate itself, another plate, another one turned by 90 degrees, the plate smoothed.
_BASES = (0.5, 0.7, 0.8, 1.0)
_PLAIN = 0.5  # share of pieces and smoothed spots that keep the plate's brightness
_SMOOTHED_PX = 6.0  # spread of the smoothing
_CONTRAST = (0.8, 6.0)  # a stain's difference, in standard deviations of the plate around its own smoothed picture
_CHANGE = (0.02, 0.5)  # the same difference in grey levels, at least and at most
_GRAIN = 0.3  # spread of a stain's grain, relative to its difference
_VISIBLE = 0.35  # least change that is labelled, in the same standard deviations
_LEAST_CHANGE = 2.5 / 255  # that is labelled
# Least area of a spot that is labelled, px, and as a share of the spot: others are left out of the picture.
_LEAST_AREA_PX = 8
_LEAST_SHARE = 0.3
_NUMBERS = 13  # that one spot takes


def alter(key: Array, plates: Array, others: Array, *, most: int = 1, probability: float = 1.0, strength: float = 1.0):
    """Alters good plates; pure and jittable.

    Each plate is altered with `probability`, then in 1 to `most` spots. A spot that would hardly be seen is left out.

    Args:
      key: a JAX PRNG key.
      plates: float32 [b, p, p] in [0, 1], good ones.
      others: of the same shape, other good plates of the line.
      most: most spots on a plate.
      probability: of a plate to be altered.
      strength: factor on every change, 0 for none.

    Returns:
      images: float32 [b, p, p] in [0, 1].
      masks: bool [b, p, p]: where the plate changed visibly.

    Raises:
      ValueError: shapes or dtypes other than these, or an option out of its range.
    """
    if plates.ndim != 3 or plates.shape[1] != plates.shape[2] or plates.shape != others.shape:
        raise ValueError(f"plates and others must be [b, p, p] of one shape, got {plates.shape} and {others.shape}")
    if plates.dtype != jnp.float32 or others.dtype != jnp.float32:
        raise ValueError(f"plates and others must be float32, got {plates.dtype} and {others.dtype}")
    if most < 1 or not 0 <= probability <= 1 or strength < 0:
        raise ValueError(f"need most >= 1, a probability and a strength >= 0, got {most}, {probability} and {strength}")
    b, p, _ = plates.shape
    of_plate, of_noise = jax.random.split(key)
    u = jax.random.uniform(of_plate, (2 + most * _NUMBERS, b, 1, 1))
    coarse, fine = _noise(of_noise, most * b, p)
    smooth = gaussian_mean(plates, _SMOOTHED_PX)
    spread = jnp.sqrt(jnp.mean(jnp.square(plates - smooth), axis=(1, 2), keepdims=True))
    count = jnp.where(u[0] < probability, 1 + jnp.floor(u[1] * most), 0)
    bases = (plates, others, others.swapaxes(1, 2), smooth)
    images, masks = plates, jnp.zeros(plates.shape, bool)
    for i in range(most):
        v, part = u[2 + i * _NUMBERS :][:_NUMBERS], slice(i * b, (i + 1) * b)
        cover, inside = _spot(v[:7], coarse[part], p)
        new = _content(v[7:], bases, cover, spread, fine[part])
        change = jnp.where(i < count, strength * cover * (new - images), 0.0)
        change = jnp.clip(images + change, 0, 1) - images
        seen = gaussian_mean(jnp.abs(gaussian_mean(change, 1.0)), 1.5) > jnp.maximum(_VISIBLE * spread, _LEAST_CHANGE)
        seen &= inside & (change != 0)
        area, whole = (jnp.sum(part, axis=(1, 2), keepdims=True, dtype=jnp.float32) for part in (seen, inside))
        kept = area >= jnp.maximum(_LEAST_SHARE * whole, _LEAST_AREA_PX)
        images, masks = jnp.where(kept, images + change, images), masks | (seen & kept)
    return jnp.clip(images, 0, 1), masks


def _log_between(u: Array, low: float, high: float) -> Array:
    return low * (high / low) ** u


def _noise(key: Array, num: int, p: int) -> tuple[Array, Array]:
    """Noise [num, p, p] of unit variance or less, of 8 px and of 2 px."""

    def one(key: Array, px: int) -> Array:
        return jax.image.resize(jax.random.normal(key, (num, -(-p // px), -(-p // px))), (num, p, p), "linear")

    coarse, fine = jax.random.split(key)
    return one(coarse, 8), one(fine, 2)


def _spot(u: Array, noise: Array, p: int) -> tuple[Array, Array]:
    """Cover in [0, 1] and the inside, bool, both [b, p, p], of spots that the numbers `u` [7, b, 1, 1] stand for."""
    length = _log_between(u[0], _LENGTH_PX[0], min(_LENGTH_PX[1], 0.7 * p))
    ratio = _log_between(u[1], 1.0, _SLENDER)
    a, b = length / 2, jnp.maximum(length / ratio, _WIDTH_PX) / 2
    turn = u[2] / _ALONG
    angle = jnp.where(turn < 1, _TILT * (2 * turn - 1), jnp.pi * (u[2] - _ALONG) / (1 - _ALONG))
    at = jnp.arange(p, dtype=jnp.float32)
    dy, dx = at[None, :, None] - u[3] * p, at[None, None, :] - u[4] * p
    along, across = jnp.cos(angle) * dy + jnp.sin(angle) * dx, jnp.cos(angle) * dx - jnp.sin(angle) * dy
    distance = jnp.sqrt(jnp.square(along / a) + jnp.square(across / b)) + 0.35 * u[5] * noise
    soft = _log_between(u[6], *_SOFT_PX)
    cover = jnp.clip((1 - distance) * b / jnp.minimum(soft, b), 0, 1)
    return cover, cover > 0.1


def _content(u: Array, bases: tuple[Array, ...], cover: Array, spread: Array, grain: Array) -> Array:
    """What the plates become in the spot [b, p, p], from the numbers `u` [6, b, 1, 1]."""
    plates = bases[0]
    new = jnp.select([u[0] < share for share in _BASES], bases)

    def mean(x):
        return jnp.sum(x * cover, axis=(1, 2), keepdims=True) / (jnp.sum(cover, axis=(1, 2), keepdims=True) + 1e-6)

    own = u[0] < _BASES[0]
    new += jnp.where(own, 0, mean(plates) - mean(new))
    contrast = jnp.clip(_log_between(u[1], *_CONTRAST) * spread, *_CHANGE)
    contrast = jnp.where(u[2] < 0.5, -contrast, contrast)
    stain = contrast * (1 + _GRAIN * u[3] * grain)
    # A factor changes what is bright, an offset everything.
    stain = jnp.where(u[4] < 0.3, stain * new / (mean(new) + 0.05), stain)
    return new + jnp.where(~own & (u[5] < _PLAIN), 0, stain)
