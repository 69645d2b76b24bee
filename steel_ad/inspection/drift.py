"""Whether inspected tiles have moved away from the calibration tiles, before false alarms show it.

After every block of inspected tiles, the newest block and the newest four blocks are compared with calibration by a rank test
of location, which a few defects move little. Where inspected and calibration tiles are independent and alike, the chance of a
false warning after a block is at most `rate`, on average over calibrations. For that, one tile is drawn of each strip, plate or row
of tiles. Strips that differ more than the tiles of one strip are not alike, and a warning that says so is right.

A lens, a distance or an encoder changes the pattern's pitch: across, along, or both.

Source: Mann and Whitney 1947, with Bonferroni's correction over quantities and windows.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from steel_ad.ops import spectrum

BLOCK = 64
RATE = 0.001
_WINDOWS = (1, 4)  # in blocks: soon where much has moved, later where little has
LOOKS = ("brightness", "contrast")
PITCHES = ("pitch across", "pitch along")
# The autocorrelation of a smaller tile, up to half its side, holds no usable lattice.
LEAST_TILE_PX = 64
# Mean correlation at the lattice's points below which a tile shows no clear pattern.
_ECHO = 0.1
_REACH = 0.1  # relative change of pitch that is still found


@dataclasses.dataclass(frozen=True)
class Moved:
    """A warning.

    Attributes:
      quantity: its name.
      first, last: numbers of the inspected tiles that show it, from 0, last exclusive.
      good_median, median: of the calibration tiles and of those tiles.
      p_value: of the rank test, two-sided, before the correction.
    """

    quantity: str
    first: int
    last: int
    good_median: float
    median: float
    p_value: float

    def __str__(self) -> str:
        word = "rose" if self.median > self.good_median else "fell"
        unit = " px" if self.quantity in PITCHES else ""
        return (
            f"{self.quantity} {word} from {self.good_median:.4g}{unit} at calibration to {self.median:.4g}{unit} in tiles "
            f"{self.first} to {self.last - 1} (p = {self.p_value:.1g})"
        )


def measure(tiles: np.ndarray, lattice: ArrayLike | None) -> dict[str, np.ndarray]:
    """What is compared of tiles beside their scores, by name: float64 `[n]` each.

    Args:
      tiles: uint8 `[n, h, w]`.
      lattice: of the good tiles `[2, 2]`, as `pattern` reads it; None: pitches are not measured.

    Returns:
      "brightness" and "contrast", the mean and standard deviation in grey levels; "pitch across" and "pitch along" of the
      pattern in px, NaN where a tile shows no clear pattern.
    """
    grey = tiles.reshape(len(tiles), tiles.shape[1] * tiles.shape[2])
    # Whole numbers below 2^53, so exact.
    total, square = grey.sum(1, dtype=np.int64), np.einsum("ij,ij->i", grey, grey, dtype=np.int64)
    mean = total / grey.shape[1]
    found = {"brightness": mean, "contrast": np.sqrt(np.maximum(square / grey.shape[1] - mean**2, 0))}
    return found if lattice is None else found | _pitches(tiles, np.asarray(lattice, np.float32))


def pattern(tiles: np.ndarray) -> np.ndarray | None:
    """The lattice that tiles uint8 `[n, h, w]` have in common: float32 `[2, 2]`, two vectors (y, x) in px.

    None where there is no tile, where the tiles are too small, or where nothing repeats in two directions within half a tile.
    """
    if not len(tiles) or min(tiles.shape[1:]) < LEAST_TILE_PX:
        return None
    with jax.default_device(_host()):
        mean = np.mean([spectrum.autocorrelation(jnp.asarray(t, jnp.float32) / 255) for t in tiles], 0)
        found = spectrum.read_lattice(mean)
    return None if found is None else np.asarray(found.vectors)


def _pitches(tiles: np.ndarray, lattice: np.ndarray) -> dict[str, np.ndarray]:
    # A program of one tile serves any number of them; on the host it need not wait for the detector's work on an accelerator.
    with jax.default_device(_host()):
        read = jax.device_get([_near(tile, lattice) for tile in tiles])
    vectors = np.array([r.vectors for r in read], np.float64).reshape(-1, 2, 2)
    echo = np.array([r.echo for r in read], np.float64)
    found = {}
    for name, axis in zip(PITCHES, (1, 0), strict=True):
        steps = _repeat(lattice, axis)
        pitch, usual = np.hypot(*(steps @ vectors).T), np.hypot(*(steps @ lattice))
        # A pitch beyond the reach is that of another peak.
        clear = (echo >= _ECHO) & (np.abs(pitch / usual - 1) <= 1.2 * _REACH)
        found[name] = np.where(clear, pitch, np.nan)
    return found


@jax.jit
def _near(tile: jax.Array, lattice: jax.Array) -> spectrum.Lattice:
    image = tile.astype(jnp.float32) / 255
    return spectrum.lattice_near(spectrum.autocorrelation(image), lattice, reach=_REACH)


def _repeat(lattice: np.ndarray, axis: int) -> np.ndarray:
    """Steps `[2]` along the lattice's vectors to the shortest repeat within 20 degrees of an axis (0: y), or to the nearest to it."""
    steps = np.array([(i, j) for i in range(3) for j in range(-2, 3) if (i, j) > (0, 0)])
    repeats = steps @ lattice
    length = np.hypot(*repeats.T)
    aside = np.degrees(np.arccos(np.minimum(np.abs(repeats[:, axis]) / length, 1)))
    return steps[np.argmin(np.where(aside <= 20, length, 1e6 + aside))]


def _host() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


def moved(
    values: Mapping[str, Sequence[float]], good: Mapping[str, ArrayLike], *, rate: float = RATE, block: int = BLOCK
) -> list[Moved]:
    """The quantities that have moved, judged by the newest tiles; nothing unless the newest tile ends a block.

    Args:
      values: of each quantity, `[n]` of the tiles inspected so far, in order; NaN where a tile has no value.
      good: of the same quantities, `[m]` of the calibration tiles.
      rate: chance of a false warning at each end of a block.
      block: number of tiles.

    Raises:
      ValueError: other quantities than calibration's, or of different lengths.
    """
    lengths = {len(v) for v in values.values()}
    if values.keys() != good.keys() or len(lengths) != 1:
        raise ValueError(f"{sorted(values)} of lengths {sorted(lengths)} do not match calibration's {sorted(good)}")
    (n,) = lengths
    if n == 0 or n % block:
        return []
    series = {name: np.asarray(v, np.float64) for name, v in values.items()}
    # From the first block on all windows count, so that the rate holds at every one.
    level = rate / (len(series) * len(_WINDOWS))
    found = []
    for name, observed in series.items():
        reference = np.asarray(good[name], np.float64)
        seen = [(p, w) for w in _WINDOWS if w * block <= n for p in [_p_value(observed[n - w * block :], reference)]]
        p, window = min(seen)
        if p <= level:
            newest = observed[n - window * block :]
            medians = float(np.nanmedian(reference)), float(np.nanmedian(newest))
            found.append(Moved(name, n - newest.size, n, *medians, p))
    return found


def history(
    values: Mapping[str, Sequence[float]], good: Mapping[str, ArrayLike], *, rate: float = RATE, block: int = BLOCK
) -> list[Moved]:
    """The first warning of each quantity in a whole inspection; arguments as `moved`'s."""
    first: dict[str, Moved] = {}
    series = {name: np.asarray(v, np.float64) for name, v in values.items()}
    for end in range(block, 1 + min((v.size for v in series.values()), default=0), block):
        for one in moved({k: v[:end] for k, v in series.items()}, good, rate=rate, block=block):  # type: ignore[misc]
            first.setdefault(one.quantity, one)
    return list(first.values())


def _p_value(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if not a.size or not b.size or ((a == a[0]).all() and (b == a[0]).all()):
        return 1.0
    return float(stats.mannwhitneyu(a, b, method="asymptotic").pvalue)
