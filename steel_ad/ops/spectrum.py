"""Spectra of plates, and the lattice of a pattern read off the autocorrelation (SPEC section 5).

The autocorrelation is the transform of the power spectrum; its peaks are the pattern's own lattice, in pixels, and are read to a
fraction of one.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import ndimage

from steel_ad.ops.filters import box_mean

# Shorter lags are the pattern's own grain, not its repeat.
LEAST_PITCH_PX = 8.0
# Correlation below which an echo is chance.
_ECHO = 0.1
# Share of the best lattice's mean echo that a smaller cell must reach: half a teardrop's cell stays below, noise above.
_SAME = 0.85
# A lattice point's peak is looked for so far around its place, in pixels.
_SEARCH = 3


class Lattice(NamedTuple):
    """A pattern's lattice: `vectors` [2, 2] are two primitive vectors, one a row, each (y, x) in pixels, the one more across
    first, (roughly) pointing right and down; `deviation` [2, 2] their standard errors, infinite where too few
    peaks tell them; `echo` the mean correlation of the
    pattern with itself at the lattice's points, in [-1, 1]."""

    vectors: Array | np.ndarray
    deviation: Array | np.ndarray
    echo: Array | np.ndarray


def log_amplitude(image: Array) -> Array:
    """Centred log(1 + amplitude) of the DFT of an image `[h, w]`: float `[h, w]`, >= 0, frequency 0 at `[h // 2, w // 2]`."""
    return jnp.log1p(jnp.abs(jnp.fft.fftshift(jnp.fft.fft2(image))))


def phase(image: Array) -> Array:
    """Centred phase of the DFT, atan2(imaginary, real), of an image `[h, w]`: float `[h, w]` in [-pi, pi] radians."""
    spectrum = jnp.fft.fftshift(jnp.fft.fft2(image))
    return jnp.arctan2(spectrum.imag, spectrum.real)


def window(shape: tuple[int, ...]) -> np.ndarray:
    """Separable Hann window, float32 `[h, w]` in (0, 1): nowhere 0, so that what it weights can be divided by it."""
    down, across = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in shape)
    return np.outer(down, across).astype(np.float32)


def mean_amplitude(images: Array) -> Array:
    """Mean amplitude spectrum of images `[n, h, w]`, each less its mean and windowed: `[h, w // 2 + 1]`, laid out as `rfft2`'s."""
    centred = (images - images.mean((1, 2), keepdims=True)) * jnp.asarray(window(images.shape[1:]))[None]
    return jnp.abs(jnp.fft.rfft2(centred)).mean(0)


def centred(half: Array, width: int) -> Array:
    """The whole centred amplitude spectrum `[h, width]` of the half `[h, width // 2 + 1]` that `mean_amplitude` returns."""
    opposite = jnp.roll(half[::-1], 1, 0)[:, width - half.shape[1] : 0 : -1]
    return jnp.fft.fftshift(jnp.concatenate([half, opposite], 1))


@functools.partial(jax.jit, static_argnames="reach")
def autocorrelation(image: Array, *, reach: float = 0.5) -> Array:
    """Correlation of an image with itself, by lag, without bias by the overlap and without slow changes of brightness.

    Args:
      image: `[h, w]`, floating, both sides at least 32.
      reach: largest lag as a share of the side, below 1; few pixels tell long ones.

    Returns:
      `[2 a + 1, 2 b + 1]` for largest lags of a and b pixels, 1 at lag 0 in the middle, and of a flat image 0 everywhere else.

    Raises:
      ValueError: the image is too small.
    """
    h, w = image.shape
    if min(h, w) < 32:
        raise ValueError(f"an image of {h}x{w} pixels is too small to correlate: at least 32x32 are needed")
    x = image - box_mean(image, (min(h, w) // 4) | 1)
    x = x - x.mean()
    # Twice the size, so that the ends do not meet.
    spectrum = jnp.fft.rfft2(x, (2 * h, 2 * w))
    full = jnp.fft.irfft2(spectrum.real**2 + spectrum.imag**2, (2 * h, 2 * w))
    furthest = int(h * reach), int(w * reach)
    lags = [np.arange(-n, n + 1) for n in furthest]
    found = jnp.roll(full, furthest, (0, 1))[: len(lags[0]), : len(lags[1])]
    overlap = np.outer(h - abs(lags[0]), w - abs(lags[1])).astype(np.float32)
    # A flat image's rounding has a correlation too, which must not be blown up.
    power = jnp.maximum(full[0, 0] / (h * w), 1e-8)
    return (found / (overlap * power)).at[furthest].set(1)


def _smoothed(correlation: Array) -> Array:
    return box_mean(box_mean(correlation, 3), 3)


def _steps(order: int) -> np.ndarray:
    """Lattice steps (i, j) up to `order`, one of each pair of opposite ones: int `[n, 2]`."""
    i, j = np.mgrid[-order : order + 1, -order : order + 1].reshape(2, -1)
    half = (i > 0) | ((i == 0) & (j > 0))
    return np.stack([i[half], j[half]], 1)


def _peak(correlation: Array, place: Array) -> tuple[Array, Array]:
    """The peak near a lag (y, x): its lag `[2]`, to a fraction of a pixel, and its height, 0 where there is none."""
    middle = np.array(correlation.shape) // 2
    side = 2 * _SEARCH + 1
    corner = jnp.clip(
        jnp.round(place).astype(jnp.int32) + (middle - _SEARCH), 1, np.array(correlation.shape) - side - 1
    )
    near = lax.dynamic_slice(correlation, (corner[0], corner[1]), (side, side))
    row, column = jnp.divmod(jnp.argmax(near), side)
    inside = (row > 0) & (row < side - 1) & (column > 0) & (column < side - 1)
    row, column = jnp.clip(row, 1, side - 2), jnp.clip(column, 1, side - 2)
    p = lax.dynamic_slice(near, (row - 1, column - 1), (3, 3))
    # The top of the paraboloid through the nine values.
    gy, gx = (p[2].sum() - p[0].sum()) / 6, (p[:, 2].sum() - p[:, 0].sum()) / 6
    hyy = (p[0] - 2 * p[1] + p[2]).sum() / 3
    hxx = (p[:, 0] - 2 * p[:, 1] + p[:, 2]).sum() / 3
    hxy = (p[2, 2] - p[2, 0] - p[0, 2] + p[0, 0]) / 4
    determinant = hyy * hxx - hxy * hxy
    curved = (hyy < 0) & (determinant > 0)
    safe = jnp.where(curved, determinant, 1)
    top = jnp.stack([hxy * gx - hxx * gy, hxy * gy - hyy * gx]) / safe
    lag = (corner + jnp.stack([row, column]) - middle.astype(np.int32)).astype(correlation.dtype) + jnp.clip(top, -1, 1)
    return lag, jnp.where(inside & curved, jnp.maximum(p[1, 1], 0), 0)


def inverse(m: Array) -> Array:
    """Inverse of a matrix `[2, 2]`, which need not be regular: what is not finite then says so."""
    (a, b), (c, d) = m
    return jnp.stack([d, -b, -c, a]).reshape(2, 2) / (a * d - b * c)


@functools.partial(jax.jit, static_argnames="order")
def refine_lattice(correlation: Array, vectors: Array, *, order: int = 3) -> Lattice:
    """The lattice near a known one that fits an autocorrelation's peaks best, by weighted least squares.

    Args:
      correlation: `[2 a + 1, 2 b + 1]`, as `autocorrelation` returns it.
      vectors: `[2, 2]`, (y, x) in pixels, one a row, right to about 3 pixels.
      order: steps along each vector up to which peaks are used, where the lags reach as far.

    Returns:
      The lattice; vectors stay what they were as far as no peak says otherwise. Jittable; `jax.vmap` makes the batch.
    """
    smooth = _smoothed(correlation)
    dtype = correlation.dtype
    reach = jnp.asarray(np.array(correlation.shape) // 2, dtype)[None]

    def fit(vectors: Array, order: int) -> Lattice:
        steps = jnp.asarray(_steps(order), dtype)
        places = steps @ vectors
        lags, heights = jax.vmap(lambda place: _peak(smooth, place))(places)
        inside = (jnp.abs(places) < reach - 2 * _SEARCH).all(1)
        # A long lag has few pixels to tell it.
        overlap = (1 - jnp.abs(places) / (2 * reach)).prod(1)
        weights = jnp.where(inside, heights * overlap, 0)
        # The known lattice counts as one faint peak at each vector's end.
        normal = (steps * weights[:, None]).T @ steps + 1e-3 * jnp.eye(2, dtype=dtype)
        to_vectors = inverse(normal)
        moved = to_vectors @ ((steps * weights[:, None]).T @ (lags - places))
        error = lags - places - steps @ moved
        count = (weights > 0).sum()
        # Both coordinates of a peak are misread alike; two vectors of two coordinates are fitted.
        variance = (weights[:, None] * error**2).sum() / (2 * weights.sum() + 1e-9)
        variance = variance * (count / jnp.maximum(count - 2, 1)).astype(dtype)
        # All peaks come of the same pixels, so that their errors do not average out.
        deviation = jnp.abs(to_vectors @ (steps * weights[:, None]).T).sum(1) * jnp.sqrt(variance)
        # As many peaks as unknowns fit exactly, whatever their error.
        deviation = jnp.where(count > 2, deviation, jnp.inf)
        echo = (weights * heights).sum() / (weights.sum() + 1e-9)
        return Lattice(vectors + moved, jnp.broadcast_to(deviation[:, None], (2, 2)), echo)

    # Near peaks first: an error of the vectors grows with the lag.
    found = fit(vectors, 1)
    for further in range(2, order + 1):
        found = fit(jnp.asarray(found.vectors), further)
    return found


@functools.partial(jax.jit, static_argnames="reach")
def lattice_near(correlation: Array, vectors: Array, *, reach: float = 0.1) -> Lattice:
    """The lattice of a pattern that is a known one but for its scale along and across, each within `1 +- reach`.

    Args:
      correlation: `[2 a + 1, 2 b + 1]`, as `autocorrelation` returns it.
      vectors: `[2, 2]`, (y, x) in pixels, one a row: the known lattice.

    Returns:
      As `refine_lattice`, from the scales at which the pattern resembles itself best: to 2 % the refinement finds the rest.
      Where there is no pattern, `echo` says so. Jittable; `jax.vmap` makes the batch.
    """
    dtype = correlation.dtype
    steps = jnp.asarray(_steps(2), dtype)
    scales = jnp.asarray(np.linspace(1 - reach, 1 + reach, 1 + 2 * math.ceil(reach / 0.02)), dtype)
    middle = np.array(correlation.shape) // 2
    y, x = (jnp.round(jnp.multiply.outer(scales, (steps @ vectors)[:, k])).astype(jnp.int32) for k in (0, 1))
    inside = (jnp.abs(y).max(0) < middle[0]) & (jnp.abs(x).max(0) < middle[1])
    # [scale along, scale across, step]; the same steps at all scales, or the few that near lags reach would win.
    seen = _smoothed(correlation)[y[:, None] + middle[0], x[None] + middle[1]]
    mean = jnp.where(inside[None, None], seen, 0).sum(2)
    along, across = jnp.unravel_index(jnp.argmax(mean), mean.shape)
    return refine_lattice(correlation, vectors * jnp.stack([scales[along], scales[across]])[None])


def reduced(vectors: np.ndarray) -> np.ndarray:
    """The shortest basis of a lattice (Lagrange, Gauss), float64 `[2, 2]`, in `Lattice.vectors`' order and directions."""
    a, b = np.asarray(vectors, np.float64)
    while True:
        if a @ a > b @ b:
            a, b = b, a
        times = np.round(a @ b / (a @ a))
        if times == 0:
            break
        b = b - times * a
    first, second = (a, b) if abs(a[1]) * np.hypot(*b) >= abs(b[1]) * np.hypot(*a) else (b, a)
    return np.stack([first * (-1 if first[1] < 0 else 1), second * (-1 if second[0] < 0 else 1)])


def read_lattice(correlation: Array | np.ndarray, *, least_echo: float = _ECHO) -> Lattice | None:
    """The lattice of a pattern from its autocorrelation, or a mean of several.

    Every pair of peaks spans a lattice; of those at whose points the pattern resembles itself best, the one of smallest cell.

    Args:
      correlation: `[2 a + 1, 2 b + 1]`, as `autocorrelation` returns it.
      least_echo: mean correlation at the lattice's points below which a lattice is chance.

    Returns:
      The lattice as numpy arrays, or None where nothing repeats in two directions within the lags.
    """
    smooth = np.asarray(_smoothed(jnp.asarray(correlation)))
    middle = np.array(smooth.shape) // 2
    y, x = (np.arange(n) - n // 2 for n in smooth.shape)
    top = (ndimage.maximum_filter(smooth, 7) == smooth) & (smooth > _ECHO)
    top &= (y[:, None] > 0) | ((y[:, None] == 0) & (x > 0))
    top &= (
        (np.hypot(y[:, None], x) >= LEAST_PITCH_PX) & (np.abs(y)[:, None] < middle[0] - 1) & (np.abs(x) < middle[1] - 1)
    )
    # Along a stripe the correlation hardly falls, whatever noise makes of its top.
    ring = np.pad(np.zeros((9, 9), bool), 1, constant_values=True)
    top &= ndimage.maximum_filter(smooth, footprint=ring, mode="constant", cval=-1.0) < 0.95 * smooth
    places = np.argwhere(top)
    places = places[np.argsort(-smooth[top], kind="stable")[:30]] - middle
    near = ndimage.maximum_filter(smooth, 5)
    candidates = []
    for i, first in enumerate(places):
        for second in places[:i]:
            area = abs(first[0] * second[1] - first[1] * second[0])
            # Nearly parallel ones span no cell.
            if area < 0.3 * math.hypot(*first) * math.hypot(*second):
                continue
            vectors = reduced(np.stack([first, second]))
            steps = _steps(min(12, int(2 * max(middle) * max(map(np.linalg.norm, vectors)) / area) + 1))
            points = np.round(steps @ vectors).astype(int)
            points = points[(np.abs(points) < middle - 2).all(1)]
            if len(points) < 2:
                continue
            weights = (1 - np.abs(points) / (2 * middle)).prod(1)
            echo = (weights * near[tuple((points + middle).T)]).sum() / weights.sum()
            candidates.append((echo, area, vectors))
    if not candidates:
        return None
    best = max(echo for echo, _, _ in candidates)
    if best < least_echo:
        return None
    same = [c for c in candidates if c[0] >= _SAME * best]
    smallest = min(area for _, area, _ in same)
    vectors = max((c for c in same if c[1] <= 1.1 * smallest), key=lambda c: c[0])[2]
    found = refine_lattice(jnp.asarray(correlation), jnp.asarray(vectors, np.asarray(correlation).dtype))
    return Lattice(*(np.asarray(part) for part in found))


def pitch_and_angle(lattice: Lattice) -> list[dict[str, float]]:
    """Of each vector: pitch_px, angle_deg (0 points right, 90 down), and their standard errors, infinite where not known."""
    rows = []
    for vector, deviation in zip(
        np.asarray(lattice.vectors, np.float64), np.asarray(lattice.deviation, np.float64), strict=True
    ):
        pitch = float(np.hypot(*vector))
        known = np.isfinite(deviation).all()
        along = float(np.hypot(*(vector * deviation)) / pitch) if known else math.inf
        aside = float(np.hypot(vector[1] * deviation[0], vector[0] * deviation[1]) / pitch) if known else math.inf
        rows.append(
            {
                "pitch_px": pitch,
                "pitch_error_px": along,
                "angle_deg": math.degrees(math.atan2(vector[0], vector[1])),
                "angle_error_deg": math.degrees(aside / pitch),
            }
        )
    return rows
