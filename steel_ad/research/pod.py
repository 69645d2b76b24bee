"""Probability of detection against a defect's size, from hits and misses.

POD(a) = 1 / (1 + exp(-(b0 + b1 ln a))), fitted by maximum likelihood. a50 and a90 are the sizes found with probability one half
and nine tenths; a90/95 is the upper 95 % confidence bound of a90, by likelihood ratio: the largest size for which "POD there is
0.9" is not refused. Trials must be independent of each other.

Source: MIL-HDBK-1823A (2009), hit/miss data; Cheng and Iles 1988 (bounds by likelihood ratio).
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

_LOGIT_90 = math.log(9)
# One-sided 95 %: each end of a two-sided 90 % interval.
_LIMIT = float(stats.chi2.ppf(0.90, 1))


@dataclasses.dataclass(frozen=True)
class Curve:
    """What trials say of detection.

    Attributes:
      trials, hits: counts.
      b0, b1: of the logit in ln(size); None where there is no maximum of the likelihood.
      a50, a90, a90_95: in the sizes' unit; None where the trials do not tell.
      note: why something is None, in a sentence; "" where nothing is.
    """

    trials: int
    hits: int
    b0: float | None = None
    b1: float | None = None
    a50: float | None = None
    a90: float | None = None
    a90_95: float | None = None
    note: str = ""

    def __call__(self, size: ArrayLike) -> np.ndarray:
        """POD of sizes; a curve without a fit has none.

        Raises:
          ValueError: there is no fit.
        """
        if self.b0 is None or self.b1 is None:
            raise ValueError(f"there is no curve: {self.note}")
        return special.expit(self.b0 + self.b1 * np.log(np.asarray(size, np.float64)))


def fit(size: ArrayLike, hit: ArrayLike) -> Curve:
    """The curve of trials.

    Args:
      size: `[n]`, above 0, any unit.
      hit: `[n]`, whether the defect was found.

    Raises:
      ValueError: no trial, shapes that differ, or a size that is not positive.
    """
    a, y = np.asarray(size, np.float64), np.asarray(hit, bool)
    if a.ndim != 1 or a.shape != y.shape or not a.size or not (np.isfinite(a) & (a > 0)).all():
        raise ValueError(f"trials need sizes above 0 and hits, both [n], not {a.shape} and {y.shape}")
    n, hits = a.size, int(y.sum())
    if note := _without_a_curve(a, y):
        return Curve(n, hits, note=note)
    x = np.log(a)
    centre, spread = x.mean(), x.std()
    x = (x - centre) / spread
    sign = np.where(y, 1.0, -1.0)
    best = optimize.minimize(
        lambda b: np.logaddexp(0, -sign * (b[0] + b[1] * x)).sum(),
        (special.logit(hits / n), 1.0),
        jac=lambda b: -np.array([(g := sign * special.expit(-sign * (b[0] + b[1] * x))).sum(), (g * x).sum()]),
        method="BFGS",
        options={"gtol": 1e-8 * n},
    )
    slope = float(best.x[1])
    if slope <= 0:
        return Curve(n, hits, note="larger defects were not found more often: more trials or other sizes are needed")
    q50, q90 = (float(logit - best.x[0]) / slope for logit in (0.0, _LOGIT_90))
    bound = _bound(x, sign, 2 * best.fun + _LIMIT, q90)
    a50, a90, a90_95 = (None if q is None else math.exp(centre + spread * q) for q in (q50, q90, bound))
    note = (
        "that the chance grows with size is not certain at 95 %, so a90 has no upper bound: more trials are needed"
        if bound is None
        else ""
    )
    b1 = slope / spread
    return Curve(n, hits, float(best.x[0] - b1 * centre), b1, a50, a90, a90_95, note)


def _without_a_curve(a: np.ndarray, y: np.ndarray) -> str:
    """Why trials of sizes `a`, found or not `y`, have no curve; "" where they may have one."""
    n, hits = a.size, int(y.sum())
    if hits in (0, n):
        word, where = ("all", "below the smallest") if hits else ("none", "above the largest")
        edge = a.min() if hits else a.max()
        return f"{word} of {n} were found: the curve lies {where} size, {edge:.3g}"
    if np.log(a).std() == 0:
        return f"all sizes are {a[0]:.3g}: it takes several for a curve"
    found, missed = a[y], a[~y]
    # Equal ends are no overlap either: the likelihood grows with the slope without end.
    if missed.max() <= found.min():
        return f"all below {found.min():.3g} were missed and all above {missed.max():.3g} found: more trials in between are needed"
    if found.max() <= missed.min():
        return "the larger ones were missed and the smaller ones found: no curve grows with size"
    return ""


def _bound(x: np.ndarray, sign: np.ndarray, limit: float, q90: float) -> float | None:
    """The largest place q at which a POD of 0.9 is not refused: where the least deviance of all curves through it is `limit`.

    Args:
      x: logarithms of the sizes, standardised; `sign`: 1 where the defect was found, -1 where not.
      q90: where the best curve has 0.9.

    Returns:
      None where there is none.
    """

    def refused(q: float) -> float:
        """How far the deviance of the best curve through 0.9 at q is above the limit."""

        def deviance(b: float) -> float:
            return 2 * float(np.logaddexp(0, -sign * (_LOGIT_90 + b * (x - q))).sum())

        # It is convex in the slope, which is above that of a curve that never gets to one half within reach.
        low, high = 0.0, 1.0
        while deviance(2 * high) < deviance(high):
            high *= 2
        found = optimize.minimize_scalar(
            deviance, bounds=(low, 2 * high), method="bounded", options={"xatol": 1e-7 * high}
        )
        return float(found.fun) - limit

    reach = 1.0
    while reach < 1e3 and refused(q90 + reach) < 0:
        reach *= 2
    return float(optimize.brentq(refused, q90, q90 + reach, xtol=1e-6)) if reach < 1e3 else None
