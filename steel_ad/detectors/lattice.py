"""The plate against itself and against its line, place by place of the pattern.

Within an image that shows enough repeats, every pixel is held against the pixels that lie whole lattice steps away: the image is
folded into the unit cell of its pattern, all repeats one over the other; the median over the repeats is what the pattern looks
like at each place of the cell, the median deviation how far sound repeats differ there.

Against the line, the cell's common pattern and the ways in which it varies (principal components of many good images' cells, each
shifted to a common phase) are laid over the image and fitted to it; what is left is measured by what good images leave at that
place of the cell. That takes little more than one repeat.
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
from steel_ad.ops import cell as cells
from steel_ad.ops import spectrum
from steel_ad.ops.filters import box_mean, sample

# Halvings of the range of values that find a median: to 1/65536 of it.
_HALVINGS = 16
# How far images' lattices may differ from the line's, as a share of the distance from the image's middle.
_SLACK = 0.06
# Lags that a lattice is looked for in, as shares of an image's side, and the mean correlation that makes it one: long lags are told
# by few pixels.
_REACHES = ((0.5, 0.1), (0.7, 0.25), (0.85, 0.35))
# Good images that the common level of each part of the map is measured on.
_LEVELS_OF = 12


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "amplitude", "basis", "spread", "levels"],
    meta_fields=["cell", "repeats"],
)
@dataclasses.dataclass(frozen=True)
class LatticeState:
    """What is known of a line.

    Attributes:
      vectors: float32 `[2, 2]`, the line's lattice as `spectrum.Lattice` has it.
      amplitude: the whitening's state.
      basis: float32 `[k, u, v]`, orthonormal cells: the pattern and how it varies.
      spread: float32 `[u, v]`, mean absolute rest of good images at each place of the cell.
      levels: float32 `[3]`, mean on good images of the line's part, the repeats' part and the whitened energy.
      cell: the vectors rounded to pixels, ((y, x), (y, x)), static: programs lay out their arrays by it.
      repeats: whether an image shows enough repeats to be compared with itself; static.
    """

    vectors: Array
    amplitude: dict[str, Array]
    basis: Array
    spread: Array
    levels: Array
    cell: tuple[tuple[int, int], tuple[int, int]]
    repeats: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the cell's arrays."""
        first, second = (max(4, round(float(np.hypot(*vector)))) for vector in self.cell)
        return first, second


def line_lattice(images: Sequence[np.ndarray], count: int) -> tuple[spectrum.Lattice | None, Array, bool]:
    """The lattice that up to `count` good images have in common (None: there is none), the mean of their autocorrelations, and
    whether the lattice's points lie within half an image, so that an image shows several repeats."""
    chosen = list(common_size(images, count))
    first: Array | None = None
    for reach, least_echo in _REACHES:
        correlations = [spectrum.autocorrelation(image, reach=reach) for image in chosen]
        mean = sum(correlations[1:], correlations[0]) / len(correlations)
        first = mean if first is None else first
        found = spectrum.read_lattice(mean, least_echo=least_echo)
        if found is not None:
            return found, first, reach == _REACHES[0][0]
    assert first is not None
    return None, first, False


@dataclasses.dataclass(frozen=True)
class LatticeDetector(Detector):
    """Mean of three residuals, each in units of its level on good plates: what the line's own cell does not explain; where an
    image shows enough repeats, the root mean square deviation from the median of its repeats; and, `detail` times, the whitened
    energy, which shows fine marks on a smooth plate.

    Attributes:
      images: good images that the line's lattice is read from; each image's own lattice is refined from it.
      background: side of the box whose mean is taken off before repeats are compared, in pitches.
      window: side of the box in which the repeats' deviations are averaged, in pitches.
      floor: deviation that sound plates have everywhere, as a share of the cell's mean one.
      detail: weight of the whitened energy; 0: none.
      components: ways in which the line's cell varies, such as under a moving light.
      smoothing_px: side of the box in which the line's deviations are averaged, twice.
    """

    images: int = 24
    background: float = 3.0
    window: float = 0.25
    floor: float = 0.2
    detail: float = 1.0
    components: int = 8
    smoothing_px: int = 9
    whitening: WhiteningDetector = dataclasses.field(default_factory=WhiteningDetector)

    name = "lattice"
    title = "Lattice of the line"

    @property
    def least_px(self) -> int:  # type: ignore[override]
        return max(32, self.whitening.least_px)

    @classmethod
    def configured(cls, config: configs.Spectrum) -> "LatticeDetector":
        return cls(
            config.images,
            config.background,
            config.window,
            config.floor,
            config.detail,
            config.components,
            config.smoothing_px,
            WhiteningDetector.configured(config),
        )

    def fit(self, images: Sequence[np.ndarray]) -> LatticeState:
        """The line's lattice, cells and levels.

        Raises:
          InputError: the good images show no lattice.
        """
        found, _, repeats = line_lattice(images, self.images)
        if found is None:
            raise InputError(
                "the good images show no pattern that repeats in two directions, which the map 'lattice' needs: "
                "use larger images, or leave it out with --config.maps=phase_only,whitening"
            )
        chosen = list(common_size(images, 4 * self.images))
        state = self._state(
            {"vectors": found.vectors, "repeats": repeats, "levels": np.ones(3), **self.whitening.fit(images)}
        )
        seen, held = (chosen[::2], chosen[1::2]) if len(chosen) > 1 else (chosen, chosen)
        fold = jax.jit(self._folded)
        basis = cells.principal(np.stack([np.asarray(fold(state, image)) for image in seen]), self.components)
        state = dataclasses.replace(state, basis=jnp.asarray(basis, jnp.float32))
        rests = jax.jit(lambda state, image: self._spread_of(state, image))
        spread = sum(np.asarray(rests(state, image)) for image in held) / len(held)
        state = dataclasses.replace(state, spread=cells.smooth(jnp.asarray(spread)))
        levels = jax.jit(lambda state, image: jnp.stack([p.mean() for p in self.parts(state, image)]))
        means = [np.asarray(levels(state, image)) for image in held[:: -(-len(held) // _LEVELS_OF)]]
        return dataclasses.replace(state, levels=jnp.asarray(np.mean(means, axis=0) + 1e-6, jnp.float32))

    def to_arrays(self, state: LatticeState) -> dict[str, np.ndarray]:
        names = ("vectors", "basis", "spread", "levels", "repeats")
        return {**{n: np.asarray(getattr(state, n)) for n in names}, **self.whitening.to_arrays(state.amplitude)}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> LatticeState:
        return self._state(arrays)

    def _state(self, arrays: Mapping[str, Any]) -> LatticeState:
        (a, b), (c, d) = (tuple(round(float(x)) for x in vector) for vector in arrays["vectors"])
        state = LatticeState(
            jnp.asarray(arrays["vectors"], jnp.float32),
            {"amplitude": jnp.asarray(arrays["amplitude"])},
            jnp.zeros(0),
            jnp.zeros(0),
            jnp.asarray(arrays["levels"], jnp.float32),
            ((a, b), (c, d)),
            bool(arrays["repeats"]),
        )
        basis, spread = arrays.get("basis", np.zeros((1, *state.size))), arrays.get("spread", np.ones(state.size))
        return dataclasses.replace(
            state, basis=jnp.asarray(basis, jnp.float32), spread=jnp.asarray(spread, jnp.float32)
        )

    def residual(self, state: LatticeState, image: Array) -> Array:
        """Map float32 `[h, w]` of an image `[h, w]`, both sides at least 32 and the whitening's tile; about 1 on a good plate."""
        line, repeats, energy = self.parts(state, image)
        weights = jnp.asarray([1.0, float(state.repeats), self.detail * state.repeats]) / state.levels
        total = weights[0] * line + weights[1] * repeats + weights[2] * energy
        return total / (1 + state.repeats * (1 + self.detail))

    def parts(self, state: LatticeState, image: Array) -> tuple[Array, Array, Array]:
        """Residuals `[h, w]` against the line and against the image's own repeats, and the whitened energy; without repeats the last
        two are 0."""
        vectors = self._vectors(state, image)
        rest, at = self._rest(state, vectors, image)
        spread = cells.lay(state.spread[None], at)[0] + self.floor * state.spread.mean() + 1e-4
        deviation = rest / spread
        # In units of the image's own deviation, since another gain or grain is no defect.
        own = jnp.minimum(jnp.abs(deviation), 3).mean()
        line = cells.rms(deviation / (own + 1e-3), _odd(self.smoothing_px, min(image.shape)))
        if not state.repeats:
            return line, jnp.zeros_like(line), jnp.zeros_like(line)
        energy = self.whitening.residual(state.amplitude, image) if self.detail else jnp.zeros_like(line)
        return line, self._against_repeats(state, vectors, image), energy

    def _vectors(self, state: LatticeState, image: Array) -> Array:
        """The image's own lattice where it shows repeats, else the line's."""
        if not state.repeats:
            return state.vectors
        return jnp.asarray(spectrum.refine_lattice(spectrum.autocorrelation(image), state.vectors).vectors)

    def _folded(self, state: LatticeState, image: Array) -> Array:
        x = cells.without(_smoothed(image), jnp.asarray(cells.slow(_shape(image))))
        folded = cells.fold(x, cells.coordinates(self._vectors(state, image), _shape(image)), state.size)
        return folded - folded.mean()

    def _rest(self, state: LatticeState, vectors: Array, image: Array) -> tuple[Array, Array]:
        """What the line's cells do not explain of an image, `[h, w]`, and its coordinates in the line's phase, `[h, w, 2]`."""
        slow = jnp.asarray(cells.slow(_shape(image)))
        x = cells.without(_smoothed(image), slow)
        at = cells.coordinates(vectors, _shape(image))
        at = at - cells.offset(cells.fold(x, at, state.size), state.basis)[None, None]
        u, v = state.size
        parts = jnp.concatenate([cells.lay(state.basis, at) * np.float32(np.sqrt(u * v)), slow])
        return cells.robust_rest(x, parts), at

    def _spread_of(self, state: LatticeState, image: Array) -> Array:
        rest, at = self._rest(state, self._vectors(state, image), image)
        return cells.fold(jnp.abs(rest), at, state.size)

    def _against_repeats(self, state: LatticeState, vectors: Array, image: Array) -> Array:
        """Deviation `[h, w]` from the median of the image's repeats, in units of the median deviation."""
        h, w = _shape(image)
        first, second = (np.hypot(*vector) for vector in state.cell)
        pitch, shape = (first + second) / 2, state.size
        x = _smoothed(image)
        x = x - box_mean(x, _odd(self.background * pitch, min(h, w)))

        # Cell coordinates count from the image's middle, where an error of the vectors does least.
        middle = np.array([(h - 1) / 2, (w - 1) / 2], np.float32)
        places = jnp.asarray(_places(state.cell, (h, w), shape)) @ vectors + middle[None, None]  # [cells, phases, 2]
        valid = ((places >= 0) & (places <= 2 * middle[None, None])).all(-1)
        repeats = sample(x, places[..., 0], places[..., 1])
        typical = _median(repeats, valid)
        spread = _median(jnp.abs(repeats - typical[None]), valid).reshape(shape)
        typical = typical.reshape(shape)
        spread = cells.smooth(spread)
        spread = spread + self.floor * spread.mean() + 1e-4

        grid = np.moveaxis(np.mgrid[:h, :w], 0, -1).astype(np.float32) - middle
        at = jnp.asarray(grid) @ spectrum.inverse(vectors)
        at = (at - jnp.floor(at)) * np.array(shape, np.float32)[None, None]
        wrap = [(0, 1), (0, 1)]
        expected, scale = (
            sample(jnp.pad(cell, wrap, mode="wrap"), at[..., 0], at[..., 1]) for cell in (typical, spread)
        )
        deviation = (x - expected) / scale
        return jnp.sqrt(box_mean(deviation * deviation, _odd(self.window * pitch, min(h, w))))


def _smoothed(image: Array) -> Array:
    return box_mean(box_mean(image, 3), 3)


def _shape(image: Array) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


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
