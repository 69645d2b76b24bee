"""The plate against itself: every pixel beside the pixels that lie whole lattice steps away in the same image.

The image is folded into the unit cell of its pattern, all repeats one over the other; the median over the repeats is what the
pattern looks like at each place of the cell, the median deviation how far sound repeats differ there.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from steel_ad import config as configs
from steel_ad.data.patches import common_size
from steel_ad.detectors import Detector
from steel_ad.detectors.whitening import WhiteningDetector
from steel_ad.errors import InputError
from steel_ad.ops import spectrum
from steel_ad.ops.filters import box_mean, sample

# Halvings of the range of values that find a median: to 1/65536 of it.
_HALVINGS = 16
# How far images' lattices may differ from the line's, as a share of the distance from the image's middle.
_SLACK = 0.06


@functools.partial(jax.tree_util.register_dataclass, data_fields=["vectors", "amplitude"], meta_fields=["cell"])
@dataclasses.dataclass(frozen=True)
class LatticeState:
    """`vectors`: float32 `[2, 2]`, the line's lattice as `spectrum.Lattice` has it; `amplitude`: the whitening's state; `cell`: the
    vectors rounded to pixels and static, ((y, x), (y, x)), by which programs lay out their arrays."""

    vectors: Array
    amplitude: dict[str, Array]
    cell: tuple[tuple[int, int], tuple[int, int]]


def line_lattice(images: Sequence[np.ndarray], count: int) -> tuple[spectrum.Lattice | None, Array]:
    """The lattice that up to `count` good images have in common (None: there is none), and the mean of their autocorrelations."""
    correlations = [spectrum.autocorrelation(image) for image in common_size(images, count)]
    mean = sum(correlations[1:], correlations[0]) / len(correlations)
    return spectrum.read_lattice(mean), mean


@dataclasses.dataclass(frozen=True)
class LatticeDetector(Detector):
    """Root mean square, over a box of `window` pitches, of the deviation from the cell's median in units of the median deviation;
    and, `detail` times, the whitened energy: fine marks on a smooth plate, beside which its lugs differ more than the marks do.

    Attributes:
      images: good images that the line's lattice is read from; each image's own lattice is refined from it.
      background: side of the box whose mean is taken off first, in pitches: slow changes of brightness go with it.
      window: side of the box in which deviations are averaged, in pitches.
      floor: deviation that sound repeats have everywhere, as a share of the cell's mean one.
      detail: weight of the whitened energy, which is about 1 on a good plate, as the deviation is.
    """

    images: int = 24
    background: float = 3.0
    window: float = 0.25
    floor: float = 0.2
    detail: float = 1.0
    whitening: WhiteningDetector = dataclasses.field(default_factory=WhiteningDetector)

    name = "lattice"

    @property
    def least_px(self) -> int:  # type: ignore[override]
        return max(32, self.whitening.least_px)

    @classmethod
    def configured(cls, config: configs.Spectrum) -> "LatticeDetector":
        whitening = WhiteningDetector.configured(config)
        return cls(config.images, config.background, config.window, config.floor, config.detail, whitening)

    def fit(self, images: Sequence[np.ndarray]) -> LatticeState:
        """The line's lattice.

        Raises:
          InputError: the good images show no lattice.
        """
        found, _ = line_lattice(images, self.images)
        if found is None:
            raise InputError(
                "the good images show no pattern that repeats in two directions, which the map 'lattice' needs: "
                "use larger images, or leave it out with --config.maps=phase_only,whitening"
            )
        return _state(found.vectors, self.whitening.fit(images))

    def to_arrays(self, state: LatticeState) -> dict[str, np.ndarray]:
        return {"vectors": np.asarray(state.vectors), **self.whitening.to_arrays(state.amplitude)}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> LatticeState:
        return _state(arrays["vectors"], {"amplitude": jnp.asarray(arrays["amplitude"])})

    def residual(self, state: LatticeState, image: Array) -> Array:
        """Map float32 `[h, w]` of an image `[h, w]`, both sides at least 32 and the whitening's tile."""
        h, w = image.shape
        first, second = (np.hypot(*vector) for vector in state.cell)
        pitch = (first + second) / 2
        shape = (max(4, round(first)), max(4, round(second)))
        vectors = spectrum.refine_lattice(spectrum.autocorrelation(image), state.vectors).vectors
        x = box_mean(box_mean(image, 3), 3)
        x = x - box_mean(x, _odd(self.background * pitch, min(h, w)))

        # Cell coordinates count from the image's middle, where an error of the vectors does least.
        middle = np.array([(h - 1) / 2, (w - 1) / 2], np.float32)
        places = jnp.asarray(_places(state.cell, (h, w), shape)) @ vectors + middle[None, None]  # [cells, phases, 2]
        valid = ((places >= 0) & (places <= 2 * middle[None, None])).all(-1)
        repeats = sample(x, places[..., 0], places[..., 1])
        typical = _median(repeats, valid)
        spread = _median(jnp.abs(repeats - typical[None]), valid).reshape(shape)
        typical = typical.reshape(shape)
        for _ in range(2):
            spread = _wrapped_mean(spread)
        spread = spread + self.floor * spread.mean() + 1e-4

        grid = np.moveaxis(np.mgrid[:h, :w], 0, -1).astype(np.float32) - middle
        at = jnp.asarray(grid) @ spectrum.inverse(vectors)
        at = (at - jnp.floor(at)) * np.array(shape, np.float32)[None, None]
        wrap = [(0, 1), (0, 1)]
        expected, scale = (
            sample(jnp.pad(cell, wrap, mode="wrap"), at[..., 0], at[..., 1]) for cell in (typical, spread)
        )
        deviation = (x - expected) / scale
        coarse = jnp.sqrt(box_mean(deviation * deviation, _odd(self.window * pitch, min(h, w))))
        return coarse + self.detail * self.whitening.residual(state.amplitude, image)


def _state(vectors: Any, amplitude: dict[str, Array]) -> LatticeState:
    (a, b), (c, d) = (tuple(round(float(x)) for x in vector) for vector in vectors)
    return LatticeState(jnp.asarray(vectors, jnp.float32), amplitude, ((a, b), (c, d)))


def _odd(size: float, limit: int) -> int:
    """The odd window nearest to `size`, which fits into `limit` pixels."""
    return min(2 * round((size - 1) / 2) + 1, 2 * ((limit - 1) // 2) - 1)


@functools.lru_cache
def _places(cell: tuple, image: tuple[int, int], phases: tuple[int, int]) -> np.ndarray:
    """Cell coordinates, from the image's middle, of all samples of all cells that may touch the image: `[cells, phases, 2]`."""
    vectors = np.array(cell, np.float64)
    inside = np.array(image) / 2 * (1 + _SLACK)
    far = int(np.abs(np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * inside @ np.linalg.inv(vectors)).max()) + 1
    cells = np.moveaxis(np.mgrid[-far : far + 1, -far : far + 1], 0, -1).reshape(-1, 2)
    u, v = (np.arange(n) / n for n in phases)
    samples = np.stack(np.meshgrid(u, v, indexing="ij"), -1).reshape(-1, 2)
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    # A cell touches the image where their bounding boxes do.
    at = (cells[:, None] + corners[None]) @ vectors
    touches = ((at.min(1) <= inside) & (at.max(1) >= -inside)).all(1)
    return (cells[touches][:, None] + samples[None]).astype(np.float32)


def _median(values: Array, valid: Array) -> Array:
    """Median over axis 0 of the valid values (the lower one of two), by halving: sorting is slow on CPU. 0 where none is."""
    wanted = (valid.sum(0) + 1) // 2
    low = jnp.where(valid, values, jnp.inf).min(0)
    high = jnp.where(valid, values, -jnp.inf).max(0)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = ((values <= middle[None]) & valid).sum(0) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return jnp.where(wanted > 0, high, 0)


def _wrapped_mean(x: Array) -> Array:
    """3x3 mean of a cell `[u, v]` that repeats."""
    for axis in (0, 1):
        x = (x + jnp.roll(x, 1, axis) + jnp.roll(x, -1, axis)) / 3
    return x
