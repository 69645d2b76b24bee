"""A damaged roll is told from single defects on simulated strips, with its period, members and phase."""

import math

import numpy as np
import pytest
from scipy import stats

from steel_ad.inspection import recurrence


def strip(rng, turns, *, periodic=True, missed=0.2, false=0.2, jitter=0.01, false_anywhere=True):
    """(along, across, length, period, phase, made by the roll) of a strip of `turns` turns."""
    period = rng.uniform(300, 3000)
    length, phase = turns * period, rng.uniform(0, period)
    hits = phase + period * (np.arange(turns) + rng.normal(0, jitter, turns))
    hits = hits[(rng.random(turns) >= missed) & (hits >= 0) & (hits <= length)]
    extra = rng.uniform(0, length, rng.binomial(turns, false))
    along = np.concatenate([hits, extra])
    place = rng.uniform(0, 1000)
    across = place + rng.normal(0, 2, along.size)
    if false_anywhere:
        across[hits.size :] = rng.uniform(0, 1000, extra.size)
    if not periodic:
        along = rng.uniform(0, length, along.size)
    return along, across, length, period, phase, np.arange(along.size) < hits.size


def test_periods_are_found_with_a_fifth_missed_and_a_fifth_false():
    rng = np.random.default_rng(0)
    right = 0
    for seed in range(60):
        along, across, length, period, *_ = strip(rng, int(rng.integers(10, 41)), false_anywhere=seed % 2 == 0)
        found = recurrence.find(along, across, length, seed=seed)
        # Neither the half of the period nor its double.
        right += found.periodic and abs(found.period_mm / period - 1) < 0.01
    assert right >= 58


def test_p_values_of_streaks_without_a_period_are_uniform():
    rng = np.random.default_rng(1)
    p = []
    for seed in range(150):
        along, across, length, *_ = strip(rng, int(rng.integers(8, 25)), periodic=False)
        found = recurrence.find(along, across, length, seed=seed, surrogates=199)
        if found is not None:
            p.append(found.p_value)
    assert len(p) > 130
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_members_phase_and_roll_of_a_period():
    along, across, length, period, phase, made = strip(np.random.default_rng(2), 20)
    found = recurrence.find(along, across, length)
    expected = np.flatnonzero(made)
    assert found.members == tuple(expected[np.argsort(along[expected])])
    assert found.phase_mm == pytest.approx(phase, abs=0.02 * period)
    assert found.roll_diameter_mm == found.period_mm / math.pi
    assert found.turns == 20
    assert recurrence.summary(found).startswith(f"A period of {found.period_mm:.1f} mm")


def test_the_unit_and_the_order_do_not_matter():
    along, across, length, *_ = strip(np.random.default_rng(3), 15)
    found = recurrence.find(along, across, length)
    order = np.random.default_rng(4).permutation(along.size)
    other = recurrence.find(10 * along[order], 10 * across[order], 10 * length, tolerance_mm=100)
    assert other.period_mm == pytest.approx(10 * found.period_mm, rel=1e-6)
    assert {order[i] for i in other.members} == set(found.members)


def test_a_period_at_another_place_or_of_another_look_is_not_mixed_in():
    rng = np.random.default_rng(5)
    along, across, length, period, _, made = strip(rng, 12, missed=0, false=0)
    n = made.size
    # As many defects of another kind at the same place, at random along the strip.
    along = np.concatenate([along, rng.uniform(0, length, 4 * n)])
    across = np.concatenate([across, np.full(4 * n, across[0])])
    look = np.repeat([[0.0, 0.0], [5.0, 0.0]], [n, 4 * n], axis=0)
    found = recurrence.find(along, across, length, look=look)
    assert found.periodic
    assert found.members == tuple(np.argsort(along[:n]))
    assert found.period_mm == pytest.approx(period, rel=0.01)
    scattered = np.where(np.arange(5 * n) < n, 100.0 * np.arange(5 * n), across)
    assert not recurrence.find(along, scattered, length, look=look).periodic


def test_detections_tied_to_the_pattern_are_no_period():
    rng = np.random.default_rng(6)
    pitch, p, naive = 40.0, [], []
    for seed in range(60):
        along = pitch * (rng.integers(0, 50, 25) + 0.3) + rng.normal(0, 0.2, 25)
        naive.append(recurrence.find(along, np.zeros(25), 50 * pitch, surrogates=199, seed=seed).p_value)
        p.append(recurrence.find(along, np.zeros(25), 50 * pitch, pitch_mm=pitch, surrogates=199, seed=seed).p_value)
    assert np.mean(np.array(naive) <= 0.05) > 0.5
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    every = pitch * (np.arange(50) + 0.3)
    assert not recurrence.find(every, np.zeros(50), 50 * pitch, pitch_mm=pitch).periodic
    # The embossing roll's circumference is a multiple of the pitch, and its damage is still seen.
    turns = pitch * (10 * np.arange(14) + 0.3) + rng.normal(0, 1, 14)
    found = recurrence.find(turns, np.zeros(14), 140 * pitch, pitch_mm=pitch)
    assert found.periodic
    assert found.period_mm == pytest.approx(10 * pitch, rel=0.01)


def test_too_few_defects_at_a_place_are_no_evidence():
    assert recurrence.find(np.arange(4.0), np.zeros(4), 10.0) is None
    assert recurrence.find([], [], 10.0) is None
    assert recurrence.find(np.arange(10.0), 100 * np.arange(10.0), 10.0) is None


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([1.0], [1.0, 2.0], 9.0), {}),
        (([10.0], [1.0], 9.0), {}),
        (([1.0], [1.0], 9.0), {"look": [1.0]}),
        (([1.0], [1.0], 9.0), {"jitter": 0.2}),
        (([1.0], [1.0], 9.0), {"pitch_mm": 0.0}),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options):
    with pytest.raises(ValueError, match=r"fit together|strip|must lie"):
        recurrence.find(*arguments, **options)
