"""Batch normalisation (Ioffe & Szegedy 2015) as sums over channels, which XLA fuses with what they sum."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from steel_ad.ops.convolution import channel_sum

_EPSILON = 1e-5


@jax.custom_vjp
def by_batch(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """`[b, h, w, c]` float32 by its own mean and biased variance, both `[c]`, which are returned too and take no gradient."""
    return _forward(x, scale, bias)[0]


def _forward(x: Array, scale: Array, bias: Array):
    count = x.size // x.shape[-1]
    mean = channel_sum(x) / count
    var = jnp.maximum(channel_sum(x * x) / count - mean * mean, 0.0)
    inverse = lax.rsqrt(var + _EPSILON)
    return (_moved(x, mean, scale * inverse, bias), mean, var), (x, scale, mean, inverse)


def _backward(saved: tuple[Array, Array, Array, Array], gradients: tuple[Array, Array, Array]):
    x, scale, mean, inverse = saved
    g, count = gradients[0], x.size // x.shape[-1]
    of_bias = channel_sum(g)
    of_scale = inverse * (channel_sum(g * x) - mean * of_bias)
    # dx = slope (g - mean(g) - normalised x * mean(g * normalised x))
    slope, share = scale * inverse, inverse * of_scale / count
    of_x = g * _row(slope) - x * _row(slope * share) + _row(slope * (mean * share - of_bias / count))
    return of_x, of_scale, of_bias


by_batch.defvjp(_forward, _backward)


def by_statistics(x: Array, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
    """`[b, h, w, c]` float32 by a mean and a variance that are given, `[c]` as are scale and bias."""
    return _moved(x, mean, scale * lax.rsqrt(var + _EPSILON), bias)


def _moved(x: Array, mean: Array, slope: Array, bias: Array) -> Array:
    return x * _row(slope) + _row(bias - mean * slope)


def _row(a: Array) -> Array:
    return a.reshape(1, 1, 1, -1)
