"""Structural similarity of two images, as a map (SPEC section 4; Wang et al. 2004; Bergmann et al. 2018)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The two conventions of (c1, c2): literal constants (the thesis, Bergmann et al.), and (0.01 L)^2, (0.03 L)^2 with L = 1 (Wang et al.).
CONSTANTS = {"thesis": (0.01, 0.03), "wang": (1e-4, 9e-4)}

_STATIC = ("window_size", "window", "sigma", "c1", "c2", "alpha", "beta", "gamma", "padding")


def _uniform_mean(x: Array, k: int) -> Array:
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
    """Square root whose gradient stays finite where the variance is nothing but rounding."""
    real = variance > 1e-12
    return jnp.where(real, jnp.sqrt(jnp.where(real, variance, 1)), 0)


def _residual_2d(x, y, window_size, mean, c1, c2, alpha, beta, gamma, padding):
    if padding == "reflect":
        before = (window_size - 1) // 2
        x, y = (jnp.pad(a, ((before, window_size - 1 - before),) * 2, mode="reflect") for a in (x, y))
    # Sum and difference carry all five moments in four filters, and the residual without cancellation near 0.
    total, difference = x + y, x - y
    # Variances do not know of an offset: taking it off first keeps the digits of E[a^2] - E[a]^2 on bright flat images.
    shift_t, shift_d = (lax.stop_gradient(jnp.mean(a)) for a in (total, difference))
    total, difference = total - shift_t, difference - shift_d
    mean_t, mean_d = mean(total), mean(difference)
    var_t = jnp.maximum(mean(total * total) - mean_t * mean_t, 0)
    var_d = jnp.maximum(mean(difference * difference) - mean_d * mean_d, 0)
    mean_t, mean_d = mean_t + shift_t, mean_d + shift_d
    luminance = 2 * mean_d * mean_d / (mean_t * mean_t + mean_d * mean_d + 2 * c1)  # 1 - luminance term
    if alpha == beta == gamma == 1:
        structure = 2 * var_d / (var_t + var_d + 2 * c2)  # 1 - contrast term * structure term
        return luminance + structure - luminance * structure
    mean_x, mean_y = (mean(a - lax.stop_gradient(jnp.mean(a))) for a in (x, y))
    var_x, var_y = (
        jnp.maximum(mean(jnp.square(a - lax.stop_gradient(jnp.mean(a)))) - m * m, 0)
        for a, m in ((x, mean_x), (y, mean_y))
    )
    both = 2 * _root(var_x) * _root(var_y) + c2
    contrast = both / ((var_t + var_d) / 2 + c2)
    structure = ((var_t - var_d) / 2 + c2) / both
    return 1 - _power(1 - luminance, alpha) * _power(contrast, beta) * _power(structure, gamma)


@functools.partial(jax.jit, static_argnames=_STATIC)
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
    if not (c1 > 0 and c2 > 0 and sigma > 0 and min(alpha, beta, gamma) >= 0):
        raise ValueError(
            f"c1, c2 and sigma must be positive and exponents not negative, not {c1}, {c2}, {sigma}, {alpha}, {beta}, {gamma}"
        )
    if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(y.dtype, jnp.floating)):
        raise ValueError(f"images must be floating, in [0, 1], not {x.dtype} and {y.dtype}: divide uint8 by 255")
    mean = (
        functools.partial(_uniform_mean, k=window_size)
        if window == "uniform"
        else functools.partial(_weighted_mean, taps=_gaussian(window_size, sigma))
    )
    one = functools.partial(
        _residual_2d,
        window_size=window_size,
        mean=mean,
        c1=c1,
        c2=c2,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        padding=padding,
    )
    return one(x, y) if x.ndim == 2 else jax.vmap(one, in_axes=-1, out_axes=-1)(x, y)


@functools.partial(jax.jit, static_argnames=_STATIC)
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
      The map, of x's shape and dtype, in [-1, 1]; value and gradient are finite everywhere.

    Raises:
      ValueError: shapes differ, the image is smaller than the window, or an option is none of the above.
    """
    return 1 - ssim_residual(
        x,
        y,
        window_size=window_size,
        window=window,
        sigma=sigma,
        c1=c1,
        c2=c2,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        padding=padding,
    )
