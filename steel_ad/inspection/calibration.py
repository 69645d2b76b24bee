"""The statistics of calibration: thresholds with a false-alarm promise, as pure functions of scores.

`good_tiles` finds the images that the scores come from. A score is the maximum of a tile's opened map; a tile is called
defective where its score is above the threshold. The good tiles must be ones that no training has seen. Everything here is in
float64, and nothing but the tail model assumes a distribution.

Sources: Vovk et al. 2005 and Vovk 2012 (split conformal prediction, on average and given the calibration set), Clopper and
Pearson 1934, Coles 2001, chapter 4 (generalised Pareto distribution, profile likelihood).
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from steel_ad.errors import InputError

# The share of the scores that the tail model is fitted to, and the least number of them.
_TAIL = 0.1
_LEAST_EXCEEDANCES = 30
_LEAST_SHAPE = -0.95
# The deviance that stands for infinity in searches.
_IMPOSSIBLE = 1e9


@dataclasses.dataclass(frozen=True)
class Promise:
    """A threshold and what it promises.

    Attributes:
      threshold: a score above it is an alarm; a calibration score itself.
      rank: the threshold is the `rank`-th largest of `count` independent scores.
      count: number of independent scores, one a group.
      average_rate: probability of a false alarm on a good tile, on average over calibration sets: at most this, and exactly
        this where no two scores are equal.
      confident_rate: with probability `confidence` over calibration sets, the line's false-alarm rate is at most this.
      confidence: of `confident_rate`.
    """

    threshold: float
    rank: int
    count: int
    average_rate: float
    confident_rate: float
    confidence: float


def needed(rate: float, confidence: float | None = None) -> int:
    """The least number of independent scores that can promise a false-alarm rate, with a confidence or, for None, on average."""
    if confidence is None:
        return math.ceil(1 / _exact(rate)) - 1
    # The maximum of n scores: (1 - rate)^n <= 1 - confidence.
    n = max(1, math.floor(math.log1p(-confidence) / math.log1p(-rate)) - 1)
    while stats.binom.cdf(0, n, rate) > 1 - confidence:
        n += 1
    return n


def promise(scores: ArrayLike, rate: float, confidence: float | None = None) -> Promise:
    """The lowest threshold that keeps the false-alarm rate of good tiles.

    On average (`confidence` None) the threshold is the score of rank ceil((n + 1)(1 - rate)): a new score that is
    exchangeable with the n is above it with probability at most `rate`. With a confidence it is the r-th largest score,
    where r is the largest number with P(Beta(r, n + 1 - r) <= rate) >= confidence: the false-alarm rate that the r-th
    largest score has on the line is distributed as Beta(r, n + 1 - r).

    Args:
      scores: `[n]`, of independent good tiles (`one_per_group`), in any unit.
      rate: share of good tiles that raise an alarm, in (0, 1).
      confidence: in (0, 1); None: on average, and `confident_rate` is at 0.95.

    Raises:
      InputError: too few scores for the promise; the message says how many it takes.
      ValueError: a rate or confidence outside of (0, 1), or a score that is not finite.
    """
    ordered = _sorted(scores)
    n = ordered.size
    if not 0 < rate < 1 or not (confidence is None or 0 < confidence < 1):
        raise ValueError(f"rate {rate} and confidence {confidence} must lie in (0, 1)")
    if confidence is None:
        rank = math.floor((n + 1) * _exact(rate))
    else:
        # P(Beta(r, n + 1 - r) <= rate) = P(Binomial(n, rate) >= r)
        rank = int(np.searchsorted(-stats.binom.sf(np.arange(n), n, rate), -confidence, side="right"))
    if rank < 1:
        form = "on average" if confidence is None else f"with confidence {confidence:g}"
        raise InputError(
            f"{n} independent good calibration tiles cannot promise a false-alarm rate of {rate:g} {form}: "
            f"it takes {needed(rate, confidence)}, so add some or ask for a higher rate"
        )
    sure = 0.95 if confidence is None else confidence
    confident = float(stats.beta.ppf(sure, rank, n + 1 - rank))
    return Promise(float(ordered[n - rank]), rank, n, rank / (n + 1), confident, sure)


def one_per_group(scores: ArrayLike, groups: Sequence[Hashable], *, seed: int = 0) -> np.ndarray:
    """One score of each group, drawn uniformly: `[g]`, in the order of the groups' first scores.

    Tiles of one strip resemble each other, so n of them are worth fewer than n. Where the groups (strips) are exchangeable,
    one tile drawn from each is exchangeable with a tile drawn from a new group. A promise made from such tiles holds for the
    share of good tiles with an alarm in a new group, on average over groups, however the tiles of a group depend on each
    other. A promise with a confidence also assumes that the groups are independent and alike. Neither says how the alarms
    spread: those of one group may come together.

    Args:
      scores: `[n]`.
      groups: `[n]`, what each score belongs to.
    """
    values = _finite(scores)
    if len(groups) != values.size:
        raise ValueError(f"{values.size} scores have {len(groups)} groups")
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    draws = np.random.default_rng([seed, 0xCA1]).random(len(members))
    return values[[indices[int(u * len(indices))] for u, indices in zip(draws, members.values(), strict=True)]]


def p_values(scores: ArrayLike, calibration: ArrayLike) -> np.ndarray:
    """p-values float64 `[k]` of scores `[k]`: (1 + number of the n calibration scores that are at least as high) / (n + 1).

    For a good tile, P(p <= a) <= a for every a, on average over calibration sets.
    """
    ordered = _sorted(calibration)
    above = ordered.size - np.searchsorted(ordered, np.asarray(scores, np.float64), side="left")
    return (1 + above) / (ordered.size + 1)


@dataclasses.dataclass(frozen=True)
class Tail:
    """A threshold from a model of the tail, which the scores alone cannot prove.

    Attributes:
      threshold: the model's quantile at 1 - `rate`.
      threshold_interval: its 95 % profile-likelihood interval; the upper end is infinite where the likelihood sets none.
      rate: share of good tiles that raise an alarm, as asked for.
      rate_interval: 95 % profile-likelihood interval of the rate that `threshold` has. Both intervals take the share of scores
        above `start` as known; 30 exceedances tell it to within a third, 100 to within a fifth.
      shape: of the generalised Pareto distribution (xi); below 0 the scores have an upper end.
      scale: its scale, in the scores' unit.
      start: the score above which it was fitted.
      exceedances: number of scores above `start`.
    """

    threshold: float
    threshold_interval: tuple[float, float]
    rate: float
    rate_interval: tuple[float, float]
    shape: float
    scale: float
    start: float
    exceedances: int


def tail(scores: ArrayLike, rate: float) -> Tail:
    """The threshold of a rate too low to be promised, by a generalised Pareto distribution of the highest tenth of scores.

    Args:
      scores: `[n]`, of independent good tiles.
      rate: share of good tiles that raise an alarm, in (0, 0.1).

    Raises:
      InputError: fewer than 30 different exceedances (300 scores), or a rate that is not in the tail.
    """
    ordered = _sorted(scores)
    n = ordered.size
    count = int(_TAIL * n)
    if not 0 < rate < _TAIL:
        raise InputError(
            f"a share of {rate:g} of all tiles is not in the tail, which starts at {_TAIL:g}: ask for fewer false alarms"
        )
    start = float(ordered[n - count - 1]) if count < n else 0.0
    excess = ordered[ordered > start] - start
    if np.unique(excess).size < _LEAST_EXCEEDANCES:
        raise InputError(
            f"{n} independent good calibration tiles are too few for a tail model, which needs "
            f"{math.ceil(_LEAST_EXCEEDANCES / _TAIL)} different ones: add some"
        )
    unit = float(excess.mean())
    y = excess / unit
    exceeding = y.size / n
    # Where many scores equal the start, less than a tenth of them is above it.
    if rate >= exceeding:
        raise InputError(
            f"a share of {rate:g} of all tiles is not in the tail, since many good scores are equal and only {exceeding:.3g} are "
            "above them: ask for fewer false alarms"
        )

    def deviance(level: float, ratio: float) -> float:
        """Twice the least negative log-likelihood of all shapes with a share of 1 - 1 / ratio of the excess below `level`."""

        def at(shape: float) -> float:
            growth = math.log(ratio) if abs(shape) < 1e-9 else math.expm1(shape * math.log(ratio)) / shape
            return _deviance(y, shape, level / growth)

        return _least(at, _LEAST_SHAPE, 3.0)

    fitted = optimize.minimize(
        lambda v: _deviance(y, v[0], math.exp(v[1])), (0.1, 0.0), method="Nelder-Mead", options={"xatol": 1e-6}
    )
    shape, scale = float(fitted.x[0]), math.exp(fitted.x[1])
    ratio = exceeding / rate
    level = scale * (math.log(ratio) if abs(shape) < 1e-9 else math.expm1(shape * math.log(ratio)) / shape)
    limit = fitted.fun + stats.chi2.ppf(0.95, 1)
    low, high = _crossings(lambda v: deviance(level * math.exp(v), ratio) - limit)
    # A higher rate is a lower level.
    thin, thick = _crossings(lambda v: deviance(level, ratio * math.exp(-v)) - limit, top=math.log(ratio) - 1e-6)
    return Tail(
        start + unit * level,
        (start + unit * level * math.exp(low), start + unit * level * math.exp(high)),
        rate,
        (rate * math.exp(thin), rate * math.exp(thick)),
        shape,
        scale * unit,
        start,
        y.size,
    )


def _deviance(y: np.ndarray, shape: float, scale: float) -> float:
    # Below a shape of -1 the likelihood has no maximum.
    if shape < _LEAST_SHAPE:
        return _IMPOSSIBLE
    return min(_IMPOSSIBLE, -2 * float(stats.genpareto.logpdf(y, shape, scale=scale).sum()))


def _least(function, low: float, high: float) -> float:
    """The least value of a function with one valley."""
    grid = np.linspace(low, high, 41)
    values = [function(x) for x in grid]
    k = int(np.argmin(values))
    bounds = (grid[max(k - 1, 0)], grid[min(k + 1, 40)])
    found = optimize.minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return min(float(found.fun), values[k])


def _crossings(function, top: float = 30.0) -> tuple[float, float]:
    """Where a function that is negative at 0 becomes positive, below 0 and above it; -inf and inf (or `top`) where it never does."""

    def outwards(sign: float, end: float) -> float:
        reach = 0.05
        while reach < end and function(sign * reach) < 0:
            reach *= 2
        reach = min(reach, end)
        if function(sign * reach) < 0:
            return sign * (end if end < 30 else math.inf)
        return optimize.brentq(function, 0, sign * reach, xtol=1e-4)

    return outwards(-1, 30.0), outwards(1, top)


def _exact(rate: float) -> Fraction:
    """The rate as a decimal number says it, so that 0.01 of 100 is 1."""
    return Fraction(repr(float(rate)))


def _finite(scores: ArrayLike) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("scores must be finite numbers [n]")
    return values


def _sorted(scores: ArrayLike) -> np.ndarray:
    return np.sort(_finite(scores))
