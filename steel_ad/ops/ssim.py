"""Structural similarity of two images, as a map (SPEC section 4; Wang et al. 2004; Bergmann et al. 2018)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from steel_ad import native
from steel_ad.ops import forms

# The two conventions of (c1, c2): literal constants (the thesis, Bergmann et al.), and (0.01 L)^2, (0.03 L)^2 with L = 1 (Wang et al.).
CONSTANTS = {"thesis": (0.01, 0.03), "wang": (1e-4, 9e-4)}


def _window_mean(x: Array, k: int, sigma: float | None) -> Array:
    """Mean over a window at every valid position, uniform or (`sigma` px) Gaussian: `[h, w]` -> `[h - k + 1, w - k + 1]`."""
    if sigma is not None:
        return _weighted_mean(x, _gaussian(k, sigma))
    zero = np.zeros((), x.dtype)
    x = lax.reduce_window(x, zero, lax.add, (k, 1), (1, 1), "VALID")
    x = lax.reduce_window(x, zero, lax.add, (1, k), (1, 1), "VALID")
    return x * np.asarray(1 / k**2, x.dtype)


def _weighted_mean(x: Array, taps: np.ndarray) -> Array:
    """Correlation with separable taps as products with a banded matrix, 64 rows at a time: XLA fuses k shifted copies badly."""
    k = len(taps)
    for _ in range(2):
        outputs = x.shape[0] - k + 1
        block = min(outputs, 64)
        blocks = -(-outputs // block)
        band = np.zeros((block, block + k - 1))
        for i in range(block):
            band[i, i : i + k] = taps
        x = jnp.pad(x, ((0, blocks * block - outputs), (0, 0)))
        rows = jnp.stack([lax.slice_in_dim(x, i * block, (i + 1) * block + k - 1) for i in range(blocks)])
        x = jnp.einsum("ij,bjw->biw", np.asarray(band, x.dtype), rows, precision=lax.Precision.HIGHEST)
        x = x.reshape(blocks * block, -1)[:outputs].T
    return x


def _gaussian(window_size: int, sigma: float) -> np.ndarray:
    weights = np.exp(-0.5 * ((np.arange(window_size) - (window_size - 1) / 2) / sigma) ** 2)
    return weights / weights.sum()


def _power(base: Array, exponent: float) -> Array:
    """base ** exponent with a finite gradient at 0; a negative base is 0 unless the exponent is a whole number."""
    if exponent == 1:
        return base
    if float(exponent).is_integer():
        return lax.integer_pow(base, int(exponent))
    positive = base > 0
    return jnp.where(positive, jnp.where(positive, base, 1) ** np.asarray(exponent, base.dtype), 0)


def _root(variance: Array) -> Array:
    """Square root with gradient 0 at 0."""
    real = variance > 0
    return jnp.where(real, jnp.sqrt(jnp.where(real, variance, 1)), 0)


def _padded(x: Array, k: int, padding: str) -> Array:
    return jnp.pad(x, ((k - 1) // 2, k // 2), mode="reflect") if padding == "reflect" else x


def _unpadded(g: Array, k: int, padding: str) -> Array:
    """Transpose of `_padded`: what was reflected is added where it came from."""
    before, after = (k - 1) // 2, k // 2
    if padding == "valid":
        return g
    for axis in (0, 1):
        n = g.shape[axis] - before - after
        first = jnp.flip(lax.slice_in_dim(g, 0, before, axis=axis), axis)
        last = jnp.flip(lax.slice_in_dim(g, before + n, before + n + after, axis=axis), axis)
        g = lax.slice_in_dim(g, before, before + n, axis=axis)
        for part, place in ((first, (1, n - 1 - before)), (last, (n - 1 - after, 1))):
            g += jnp.pad(part, [place if axis == i else (0, 0) for i in (0, 1)])
    return g


class _Moments(NamedTuple):
    """Window means and variances of the sum and the difference of two images."""

    mean_t: Array
    mean_d: Array
    var_t: Array
    var_d: Array


def _of_moments(m: _Moments, c1: float, c2: float) -> Array:
    """1 - luminance * contrast * structure, without cancellation where the images are alike."""
    var_t, var_d = jnp.maximum(m.var_t, 0), jnp.maximum(m.var_d, 0)
    luminance = 2 * m.mean_d * m.mean_d / (m.mean_t * m.mean_t + m.mean_d * m.mean_d + 2 * c1)  # 1 - luminance term
    structure = 2 * var_d / (var_t + var_d + 2 * c2)  # 1 - contrast term * structure term
    return luminance + structure - luminance * structure


def _middle(x: Array) -> Array:
    """Middle of the range of values, without a gradient: `[]`."""
    return lax.stop_gradient((jnp.min(x) + jnp.max(x)) / 2)


# Sum and difference carry all five moments in four filters. A variance is the same with any offset: the sum is taken less the middle
# of its range in the image and the difference less its mean, so that what is squared is small and E[a^2] - E[a]^2 keeps its digits
# on bright, dark and flat images.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _plain_residual(x, y, k, sigma, c1, c2, padding):
    return _plain_forward(x, y, k, sigma, c1, c2, padding)[0]


def _plain_forward(x, y, k, sigma, c1, c2, padding):
    mean = functools.partial(_window_mean, k=k, sigma=sigma)
    offset_t, offset_d = _middle(x + y), jnp.mean(x - y)
    x, y = _padded(x, k, padding), _padded(y, k, padding)
    total, difference = x + y - offset_t, x - y - offset_d
    mean_t, mean_d = mean(total), mean(difference)
    var_t, var_d = mean(total * total) - mean_t * mean_t, mean(difference * difference) - mean_d * mean_d
    m = _Moments(mean_t + offset_t, mean_d + offset_d, var_t, var_d)
    return _of_moments(m, c1, c2), (total, difference, mean_t, mean_d, m)


def _plain_backward(k, sigma, c1, c2, padding, saved, g):
    """Three filters where only one image's gradient is asked for, four for both."""
    total, difference, mean_t, mean_d, m = saved
    (g_m,) = jax.vjp(functools.partial(_of_moments, c1=c1, c2=c2), m)[1](g)

    def spread(a):  # the taps are symmetric, so the filter is its own transpose
        return _window_mean(jnp.pad(a, k - 1), k, sigma)

    of_t, of_d = g_m.mean_t - 2 * g_m.var_t * mean_t, g_m.mean_d - 2 * g_m.var_d * mean_d
    square_t, square_d = 2 * total * spread(g_m.var_t), 2 * difference * spread(g_m.var_d)
    of_x = spread(of_t + of_d) + square_t + square_d
    of_y = spread(of_t - of_d) + square_t - square_d
    return _unpadded(of_x, k, padding), _unpadded(of_y, k, padding)


_plain_residual.defvjp(_plain_forward, _plain_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6, 7, 8))
def _native(x, y, form, similarity, k, sigma, c1, c2, padding):
    """The residual, or with `similarity` the map: taken from 1 by XLA it would cost another pass over memory."""
    settings = {"reflect": padding == "reflect", "c1": c1, "c2": c2, "cuda": form == "cuda"}
    return native.ssim_residual(x, y, _taps(k, sigma), **settings, similarity=similarity)


def _native_forward(x, y, form, similarity, k, sigma, c1, c2, padding):
    return _native(x, y, form, similarity, k, sigma, c1, c2, padding), (x, y)


def _native_backward(form, similarity, k, sigma, c1, c2, padding, saved, g):
    """Two calls, of which the compiler drops the one that nobody asks for: SSIM does not know which image is which."""
    g = -g if similarity else g
    x, y = saved
    settings = {"reflect": padding == "reflect", "c1": c1, "c2": c2, "cuda": form == "cuda"}
    return tuple(native.ssim_residual_gradient(*pair, g, _taps(k, sigma), **settings) for pair in ((x, y), (y, x)))


_native.defvjp(_native_forward, _native_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _native_mean(x, y, k, sigma, c1, c2, padding):
    return jnp.mean(_native(x, y, "native", False, k, sigma, c1, c2, padding))


def _native_mean_forward(x, y, k, sigma, c1, c2, padding):
    """Value and gradients from one pass each, of which the compiler drops the one whose gradient nobody asks for."""
    settings = {"reflect": padding == "reflect", "c1": c1, "c2": c2}
    (mean, of_x), (_, of_y) = (native.ssim_mean(*pair, _taps(k, sigma), **settings) for pair in ((x, y), (y, x)))
    return mean, (of_x, of_y)


def _native_mean_backward(k, sigma, c1, c2, padding, saved, g):
    return tuple(g * of for of in saved)


_native_mean.defvjp(_native_mean_forward, _native_mean_backward)


def _taps(k: int, sigma: float | None) -> np.ndarray:
    return np.full(k, 1 / k) if sigma is None else _gaussian(k, sigma)


def _general_residual(x, y, k, sigma, c1, c2, padding, alpha, beta, gamma):
    mean = functools.partial(_window_mean, k=k, sigma=sigma)
    offset_x, offset_y = _middle(x), _middle(y)
    x, y = _padded(x, k, padding) - offset_x, _padded(y, k, padding) - offset_y
    (mean_x, var_x), (mean_y, var_y) = _mean_and_variance(x, mean), _mean_and_variance(y, mean)
    covariance = mean(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + offset_x, mean_y + offset_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    both = 2 * _root(var_x) * _root(var_y) + c2
    contrast = both / (var_x + var_y + c2)
    return 1 - _power(luminance, alpha) * _power(contrast, beta) * _power((2 * covariance + c2) / both, gamma)


def _mean_and_variance(x: Array, mean) -> tuple[Array, Array]:
    """Window mean and variance, the variance 0 where it is nothing but rounding, which a root would make much of."""
    average, square = mean(x), mean(x * x)
    variance = square - average * average
    return average, jnp.where(variance > 4 * jnp.finfo(x.dtype).eps * square, variance, 0)


def ssim_residual(
    x: Array,
    y: Array,
    *,
    window_size: int = 11,
    window: str = "uniform",
    sigma: float = 1.5,
    c1: float = 0.01,
    c2: float = 0.03,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    padding: str = "reflect",
) -> Array:
    """`1 - ssim_map(x, y)`, computed without the cancellation near 0; arguments, shapes and errors as `ssim_map`'s."""
    given = (window_size, window, sigma, c1, c2, (alpha, beta, gamma), padding)
    return _compared(x, y, "residual", *given)


def mean_residual(
    x: Array,
    y: Array,
    *,
    window_size: int = 11,
    window: str = "uniform",
    sigma: float = 1.5,
    c1: float = 0.01,
    c2: float = 0.03,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    padding: str = "reflect",
) -> Array:
    """Mean of `ssim_residual(x, y)` over the map and the channels, `[]`, of which value and gradient may come from one pass; arguments
    and errors as `ssim_map`'s."""
    given = (window_size, window, sigma, c1, c2, (alpha, beta, gamma), padding)
    return _compared(x, y, "mean", *given)


def _compared(x, y, what, window_size, window, sigma, c1, c2, exponents, padding):
    """`what`: "map", "residual" or "mean"."""
    if x.shape != y.shape or x.ndim not in (2, 3):
        raise ValueError(f"ssim takes two images [h, w] or [h, w, c] of one shape, not {x.shape} and {y.shape}")
    if window not in ("uniform", "gaussian") or padding not in ("reflect", "valid"):
        raise ValueError(
            f"window is 'uniform' or 'gaussian' and padding 'reflect' or 'valid', not {window!r}, {padding!r}"
        )
    if window_size < 1 or min(x.shape[:2]) < window_size:
        raise ValueError(
            f"an image of {x.shape[0]}x{x.shape[1]} holds no window of {window_size}x{window_size}: use a smaller window_size"
        )
    if not (c1 > 0 and c2 > 0 and sigma > 0 and min(exponents) >= 0):
        raise ValueError(
            f"c1, c2 and sigma must be positive and exponents not negative, not {c1}, {c2}, {sigma}, {exponents}"
        )
    if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(y.dtype, jnp.floating)):
        raise ValueError(f"images must be floating, in [0, 1], not {x.dtype} and {y.dtype}: divide uint8 by 255")
    plain = exponents == (1, 1, 1)
    # Chosen out here, since what jit has traced does not follow when the answer changes.
    form = forms.choose("ssim", x, y, plain, window == "uniform", window_size)
    settings = (window_size, None if window == "uniform" else sigma, c1, c2, padding)
    return _traced(x, y, what, settings, exponents, form)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _traced(x, y, what, settings, exponents, form):
    def one(x, y):
        if form == "native" and what == "mean":
            return _native_mean(x, y, *settings)
        if form in ("native", "cuda"):
            found = _native(x, y, form, what == "map", *settings)
        else:
            plain = form == "plain"
            residual = _plain_residual(x, y, *settings) if plain else _general_residual(x, y, *settings, *exponents)
            found = 1 - residual if what == "map" else residual
        return jnp.mean(found) if what == "mean" else found

    if x.ndim == 2:
        return one(x, y)
    found = jax.vmap(one, in_axes=-1, out_axes=-1)(x, y)
    return jnp.mean(found) if what == "mean" else found


def ssim_map(
    x: Array,
    y: Array,
    *,
    window_size: int = 11,
    window: str = "uniform",
    sigma: float = 1.5,
    c1: float = 0.01,
    c2: float = 0.03,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    padding: str = "reflect",
) -> Array:
    """SSIM index at every pixel: luminance^alpha * contrast^beta * structure^gamma over a window moved pixel by pixel.

    With p, q the window's pixels of x, y, m their mean and s their (biased) deviation:
    `(2 m_p m_q + c1) / (m_p^2 + m_q^2 + c1)`, `(2 s_p s_q + c2) / (s_p^2 + s_q^2 + c2)`, `(2 s_pq + c2) / (2 s_p s_q + c2)`.

    Args:
      x, y: `[h, w]` or `[h, w, c]`, floating, in [0, 1]; channels are compared one by one. `jax.vmap` makes the batch.
      window_size: side of the square window in pixels.
      window: "uniform", or "gaussian" with deviation `sigma` in pixels (Wang et al.'s form, with 11 and 1.5).
      c1, c2: stabilising constants, positive; `CONSTANTS` holds the two conventions.
      alpha, beta, gamma: exponents, not negative; 0 leaves a term out. A negative luminance or structure term is clamped
        at 0 under a non-integer exponent.
      padding: "reflect" (numpy's: the edge pixel is not repeated) keeps the size; "valid" gives `[h - k + 1, w - k + 1]`.

    Returns:
      The map, of x's shape and dtype, in [-1, 1]; value and gradient are finite everywhere. With exponents of 1 it has a
      reverse-mode gradient only.

    Raises:
      ValueError: shapes differ, the image is smaller than the window, or an option is none of the above.
    """
    given = (window_size, window, sigma, c1, c2, (alpha, beta, gamma), padding)
    return _compared(x, y, "map", *given)
