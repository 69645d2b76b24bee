"""The unit cell of a pattern: images folded into it, cells laid over an image, and the place at which both fit.

Cell coordinates count steps along the lattice's two vectors from an image's middle; a cell array `[u, v]` has the pattern at
`((i + 0.5) / u, (j + 0.5) / v)`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from steel_ad.ops import spectrum
from steel_ad.ops.filters import box_mean, sample


def coordinates(vectors: Array, shape: tuple[int, int]) -> Array:
    """Cell coordinates of all pixels of an image `[h, w]`: `[h, w, 2]`, (0, 0) in its middle.

    Args:
      vectors: `[2, 2]`, (y, x) in pixels, one a row.
    """
    middle = np.array([(n - 1) / 2 for n in shape], np.float32)
    grid = np.moveaxis(np.mgrid[: shape[0], : shape[1]], 0, -1).astype(np.float32) - middle
    return jnp.asarray(grid) @ spectrum.inverse(vectors)


def fold(x: Array, at: Array, cell: tuple[int, int]) -> Array:
    """Mean of an image's pixels at each place of the cell: `[h, w]`, coordinates `[h, w, 2]` -> `[u, v]`; 0 where none lies."""
    u, v = cell
    place = jnp.floor((at - jnp.floor(at)) * jnp.asarray(cell, at.dtype)[None, None]).astype(jnp.int32)
    index = (jnp.minimum(place[..., 0], u - 1) * v + jnp.minimum(place[..., 1], v - 1)).ravel()
    total = jax.ops.segment_sum(x.ravel(), index, u * v)
    count = jax.ops.segment_sum(jnp.ones_like(x).ravel(), index, u * v)
    return (total / jnp.maximum(count, 1)).reshape(u, v)


def lay(cells: Array, at: Array) -> Array:
    """Cells `[k, u, v]` laid over an image by its coordinates `[h, w, 2]`, bilinear: `[k, h, w]`."""
    size = jnp.asarray(cells.shape[1:], at.dtype)[None, None]
    place = (at - jnp.floor(at)) * size - 0.5
    place = jnp.where(place < 0, place + size, place)
    padded = jnp.pad(cells, ((0, 0), (0, 1), (0, 1)), mode="wrap")
    return jax.vmap(lambda one: sample(one, place[..., 0], place[..., 1]))(padded)


def offset(folded: Array, basis: Array) -> Array:
    """By how much a folded image `[u, v]` is shifted against orthonormal cells `[k, u, v]`: cell coordinates `[2]`.

    It is the shift at which the cells explain most of the image, to a fraction of a pixel.
    """
    u, v = folded.shape
    spectra = jnp.fft.rfft2(basis)
    explained = (jnp.fft.irfft2(jnp.fft.rfft2(folded)[None] * jnp.conj(spectra), (u, v)) ** 2).sum(0)
    row, column = jnp.divmod(jnp.argmax(explained), v)
    near = explained[(row + jnp.arange(-1, 2)) % u][:, (column + jnp.arange(-1, 2)) % v]

    def top(before: Array, here: Array, after: Array) -> Array:
        curve = before - 2 * here + after
        return jnp.where(curve < 0, jnp.clip((before - after) / jnp.where(curve < 0, 2 * curve, 1), -0.5, 0.5), 0)

    part = jnp.stack([top(near[0, 1], near[1, 1], near[2, 1]), top(near[1, 0], near[1, 1], near[1, 2])])
    return (jnp.stack([row, column]).astype(folded.dtype) + part) / jnp.asarray([u, v], folded.dtype)


def slow(shape: tuple[int, int]) -> np.ndarray:
    """Slow changes of brightness over an image `[h, w]`: the six products of powers of y and x up to degree 2, float32 `[6, h, w]`."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    return np.stack([y**i * x**j for i in range(3) for j in range(3 - i)])


def without(x: Array, parts: Array) -> Array:
    """What is left of an image `[h, w]` beside a sum of parts `[k, h, w]` that fits it best, by least squares."""
    rows = parts.reshape(len(parts), -1)
    weights = jnp.linalg.solve(rows @ rows.T, rows @ x.ravel())
    return x - (weights @ rows).reshape(x.shape)


def robust_rest(x: Array, parts: Array, *, rounds: int = 3) -> Array:
    """As `without`, by weights that leave out what does not fit, such as a defect (Cauchy, at 2.5 times the usual deviation)."""
    rows, y = parts.reshape(len(parts), -1), x.ravel()
    ridge = 1e-4 * jnp.eye(len(parts), dtype=x.dtype)
    weight = jnp.ones_like(y)
    rest = y
    for _ in range(rounds):
        weighted = rows * weight[None]
        gram = weighted @ rows.T
        scale = jnp.diagonal(gram).mean()
        rest = y - jnp.linalg.solve(gram + scale * ridge, weighted @ y) @ rows
        usual = 1.25 * jnp.abs(rest).mean() + 1e-4
        weight = 1 / (1 + (rest / (2.5 * usual)) ** 2)
    return rest.reshape(x.shape)


def principal(cells: np.ndarray, count: int, *, rounds: int = 5) -> np.ndarray:
    """The cells' common pattern and how it varies: orthonormal `[count, u, v]` of folded images `[n, u, v]` at any shifts.

    The cells are shifted onto each other as `offset` says, first by the first of them, then by what all have in common, and
    their principal components taken.
    """
    u, v = cells.shape[1:]
    fy, fx = np.fft.fftfreq(u)[:, None], np.fft.fftfreq(v)[None]
    spectra = np.fft.fft2(cells)
    basis = cells[:1] / np.linalg.norm(cells[0])
    shift_of = jax.jit(offset)
    for i in range(rounds):
        shifts = np.stack([np.asarray(shift_of(c, basis.astype(np.float32))) for c in cells.astype(np.float32)])
        turns = np.exp(2j * np.pi * (fy * u * shifts[:, :1, None] + fx * v * shifts[:, 1:, None]))
        moved = np.fft.ifft2(spectra * turns).real
        kept = 1 if i < 2 else min(count, len(cells))
        basis = np.linalg.svd(moved.reshape(len(cells), -1), full_matrices=False)[2][:kept].reshape(kept, u, v)
    return basis


def smooth(cell: Array, times: int = 2) -> Array:
    """3x3 means of a cell `[u, v]`, which repeats."""
    for _ in range(times):
        for axis in (0, 1):
            cell = (cell + jnp.roll(cell, 1, axis) + jnp.roll(cell, -1, axis)) / 3
    return cell


def rms(x: Array, side: int) -> Array:
    """Root mean square over a box, twice: `[h, w]` -> `[h, w]`."""
    return jnp.sqrt(box_mean(box_mean(x * x, side), side))
