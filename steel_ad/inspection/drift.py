"""Whether what is inspected has moved away from what was calibrated on, before the false alarms say so.

After every block of inspected tiles, the newest block and the newest four are compared with calibration by a rank test of
location, which a few defects move little. The chance of a false warning after a block is at most `rate`, on average over
calibrations, where inspected and calibration tiles are independent and alike: draw one of each strip, picture or row of tiles.
Two strips that differ more than tiles of one do are not alike, and a warning is then right to say so.

Source: Mann and Whitney 1947, with Bonferroni's correction over quantities and windows.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

BLOCK = 64
RATE = 0.001
_WINDOWS = (1, 4)  # in blocks: soon where much has moved, later where little has


@dataclasses.dataclass(frozen=True)
class Moved:
    """A warning.

    Attributes:
      quantity: its name.
      first, last: the inspected tiles that say so, counted from 0, last exclusive.
      good_median, median: of calibration and of those tiles.
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
        return (
            f"{self.quantity} {word} from {self.good_median:.4g} at calibration to {self.median:.4g} in tiles {self.first} to "
            f"{self.last - 1} (p = {self.p_value:.1g})"
        )


def measure(tiles: np.ndarray) -> dict[str, np.ndarray]:
    """Mean ("brightness") and standard deviation ("contrast") of tiles uint8 `[n, h, w]`, in grey levels: float64 `[n]` each."""
    grey = tiles.reshape(len(tiles), tiles.shape[1] * tiles.shape[2])
    # Whole numbers below 2^53, so exact.
    total, square = grey.sum(1, dtype=np.int64), np.einsum("ij,ij->i", grey, grey, dtype=np.int64)
    mean = total / grey.shape[1]
    return {"brightness": mean, "contrast": np.sqrt(np.maximum(square / grey.shape[1] - mean**2, 0))}


def moved(
    values: Mapping[str, Sequence[float]], good: Mapping[str, ArrayLike], *, rate: float = RATE, block: int = BLOCK
) -> list[Moved]:
    """What has moved, by the newest tiles; nothing between two blocks' ends.

    Args:
      values: of each quantity, `[n]`, of the tiles inspected so far, in order.
      good: of the same quantities, `[m]`, of calibration tiles.
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
            found.append(Moved(name, n - newest.size, n, float(np.median(reference)), float(np.median(newest)), p))
    return found


def history(
    values: Mapping[str, Sequence[float]], good: Mapping[str, ArrayLike], *, rate: float = RATE, block: int = BLOCK
) -> list[Moved]:
    """All warnings of a whole inspection, arguments as `moved`'s: the first of each quantity."""
    first: dict[str, Moved] = {}
    series = {name: np.asarray(v, np.float64) for name, v in values.items()}
    for end in range(block, 1 + min((v.size for v in series.values()), default=0), block):
        for one in moved({k: v[:end] for k, v in series.items()}, good, rate=rate, block=block):  # type: ignore[misc]
            first.setdefault(one.quantity, one)
    return list(first.values())


def _p_value(a: np.ndarray, b: np.ndarray) -> float:
    if not b.size or ((a == a[0]).all() and (b == a[0]).all()):
        return 1.0
    return float(stats.mannwhitneyu(a, b, method="asymptotic").pvalue)
