"""How well a damaged roll is told from single defects: simulated strips with and without a period."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from steel_ad import config as configs
from steel_ad import files
from steel_ad.inspection import recurrence
from steel_ad.progress import progress

_PERIOD_MM = (300.0, 3000.0)
_WIDTH_MM = 1000.0
_PLACE_SIGMA_MM = 2.0


def simulate(
    rng: np.random.Generator,
    turns: int,
    *,
    periodic: bool,
    missed: float = 0.2,
    false: float = 0.2,
    jitter: float = 0.01,
    same_place: bool = False,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Defects of a strip of a whole number of turns.

    Args:
      periodic: else all defects lie anywhere along, in number and places across like those of a periodic strip.
      missed: share of the turns whose defect is not seen.
      false: number of further defects, as a share of the turns (binomial); they lie anywhere along.
      jitter: standard deviation of a position, as a share of the period.
      same_place: further defects lie at the roll's place across, else anywhere across.

    Returns:
      Positions along and across in mm `[n]` each, length of the strip and period in mm.
    """
    period = rng.uniform(*_PERIOD_MM)
    length, phase, place = turns * period, rng.uniform(0, period), rng.uniform(0, _WIDTH_MM)
    hits = phase + period * (np.arange(turns) + rng.normal(0, jitter, turns))
    hits = hits[(rng.random(turns) >= missed) & (hits >= 0) & (hits <= length)]
    extra = rng.uniform(0, length, rng.binomial(turns, false))
    along = np.concatenate([hits, extra])
    across = place + rng.normal(0, _PLACE_SIGMA_MM, along.size)
    if not same_place:
        across[hits.size :] = rng.uniform(0, _WIDTH_MM, extra.size)
    return along if periodic else rng.uniform(0, length, along.size), across, length, period


def run(config: configs.SimulatedRolls, out: Path) -> dict[str, Any]:
    """Simulates as many strips with a period as without one, and writes what was found to `out`, a JSON file.

    Returns:
      Shares of right answers (with a period: found, and within 1 %), the errors of the period, and the p-value of
      Kolmogorov and Smirnov's test that the p-values of the strips without one are uniform.
    """
    strips, rng = config.strips, np.random.default_rng([config.seed, 0x57])
    wrong = quiet = 0
    p_values: list[float] = []
    by_turns: dict[int, list[float]] = {}  # the errors of the period, infinite where none was found
    with progress("strips", 2 * strips, "strips") as update:
        for i in range(2 * strips):
            periodic = i % 2 == 0
            turns = int(rng.integers(config.least_turns, config.most_turns + 1))
            along, across, length, period = simulate(rng, turns, periodic=periodic, same_place=config.same_place)
            found = recurrence.find(along, across, length, seed=i)
            said = found is not None and found.periodic
            if periodic:
                error = abs(found.period_mm / period - 1) if found is not None and said else math.inf
                wrong += said and error > 0.01
                by_turns.setdefault(turns, []).append(error)
            else:
                quiet += not said
                p_values += [] if found is None else [found.p_value]
            update(i + 1)
    right = {turns: [e for e in errors if e <= 0.01] for turns, errors in by_turns.items()}
    result = {
        "strips": {"with a period": strips, "without": strips},
        "turns": [config.least_turns, config.most_turns],
        "false_at_the_same_place": config.same_place,
        "right_with_a_period": sum(map(len, right.values())) / strips,
        "right_without": quiet / strips,
        "wrong_periods": wrong,
        "greatest_error_of_a_right_period": max((e for errors in right.values() for e in errors), default=None),
        "uniform_p_values_ks": float(stats.kstest(p_values, "uniform").pvalue) if p_values else None,
        "right_by_turns": {str(t): [len(right[t]), len(by_turns[t])] for t in sorted(by_turns)},
    }
    files.write_json(out, result)
    return result
