"""A damaged roll is told from single defects on simulated strips, with its period, members and phase."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from steel_ad.config import SimulatedRolls
from steel_ad.errors import InputError
from steel_ad.inspection import recurrence
from steel_ad.research import simulated_rolls as study

ROOT = Path(__file__).parent.parent


def strip(rng, turns):
    """(along, across, length, period, phase, made by the roll) of a strip of `turns` turns, a fifth of them missed."""
    period = rng.uniform(300, 3000)
    length, phase = turns * period, rng.uniform(0, period)
    hits = phase + period * (np.arange(turns) + rng.normal(0, 0.01, turns))
    hits = hits[(rng.random(turns) >= 0.2) & (hits >= 0) & (hits <= length)]
    extra = rng.uniform(0, length, rng.binomial(turns, 0.2))
    across = np.concatenate([np.full(hits.size, 500.0), rng.uniform(0, 400, extra.size)])
    along = np.concatenate([hits, extra])
    return along, across, length, period, phase, np.arange(along.size) < hits.size


@pytest.mark.parametrize("same_place", [False, True])
def test_periods_are_found_and_p_values_uniform_with_a_fifth_missed_and_a_fifth_false(tmp_path, same_place):
    out = tmp_path / "found.json"
    found = study.run(SimulatedRolls(strips=60, least_turns=10, same_place=same_place), out)
    assert found["right_with_a_period"] >= 57 / 60
    assert found["right_without"] >= 59 / 60
    assert found["uniform_p_values_ks"] > 1e-3
    assert found["greatest_error_of_a_right_period"] < 0.01
    assert json.loads(out.read_text()) == found


@pytest.mark.parametrize("same_place", [False, True])
def test_simulated_strips_have_the_shares_that_were_asked_for(same_place):
    rng, turns = np.random.default_rng(3), 4000
    shares = {"missed": 0.25, "false": 0.5, "jitter": 0.0, "same_place": same_place}
    along, across, length, period = study.simulate(rng, turns, periodic=True, **shares)
    assert length == turns * period
    assert 300 <= period <= 3000
    turn = (along - along[0]) / period
    hits = np.flatnonzero(np.abs(turn - np.round(turn)) < 1e-9)
    # Six standard deviations of the binomials.
    assert abs(hits.size - 0.75 * turns) < 6 * (turns * 0.75 * 0.25) ** 0.5
    assert abs(along.size - hits.size - 0.5 * turns) < 6 * (turns * 0.5 * 0.5) ** 0.5
    assert (hits == np.arange(hits.size)).all()
    extra = slice(hits.size, None)
    assert stats.kstest(along[extra] / length, "uniform").pvalue > 1e-4
    place = np.median(across[: hits.size])
    assert stats.kstest((across[: hits.size] - place) / 2, "norm").pvalue > 1e-4
    if same_place:
        assert stats.kstest((across[extra] - place) / 2, "norm").pvalue > 1e-4
    else:
        assert stats.kstest(across[extra] / 1000, "uniform").pvalue > 1e-4
    jittered, *_, period = study.simulate(rng, turns, periodic=True, missed=0.0, false=0.0, jitter=0.02)
    assert np.diff(np.sort(jittered)).std() == pytest.approx(0.02 * 2**0.5 * period, rel=0.1)
    loose, *_, length, period = study.simulate(rng, turns, periodic=False, **shares)
    assert stats.kstest(loose / length, "uniform").pvalue > 1e-4
    assert abs(loose.size - 1.25 * turns) < 6 * (turns * (0.75 * 0.25 + 0.5 * 0.5)) ** 0.5


def test_the_simulated_strips_are_what_they_say():
    rng = np.random.default_rng(7)
    along, across, length, period = study.simulate(rng, 2000, periodic=True, false=0.0, jitter=0.001)
    assert length == 2000 * period
    assert along.size == pytest.approx(1600, abs=90)
    off = (along - along[0]) / period
    assert np.abs(off - np.rint(off)).max() < 0.01
    along, across, length, period = study.simulate(rng, 2000, periodic=True, missed=1.0)
    assert along.size == pytest.approx(400, abs=90)
    assert stats.kstest(along / length, "uniform").pvalue > 1e-3
    assert across.std() > 200
    along, across, length, period = study.simulate(rng, 2000, periodic=False, same_place=True)
    assert across.std() < 3
    assert stats.kstest((along / period) % 1, "uniform").pvalue > 1e-3


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
    along, across, length, period, _, made = strip(rng, 14)
    n = made.size
    # As many defects of another kind at the same place, at random along the strip.
    along = np.concatenate([along, rng.uniform(0, length, 4 * n)])
    across = np.concatenate([across, np.full(4 * n, across[0])])
    look = np.repeat([[0.0, 0.0], [5.0, 0.0]], [n, 4 * n], axis=0)
    found = recurrence.find(along, across, length, look=look)
    assert found.periodic
    expected = np.flatnonzero(made)
    assert found.members == tuple(expected[np.argsort(along[expected])])
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


def scratch(rng, pieces, start):
    return start + np.cumsum(rng.uniform(8, 20, pieces))


@pytest.mark.parametrize("starts", [[7000.0], [2000.0, 9100.0, 15000.0]])
def test_scratches_in_pieces_are_no_roll(starts):
    rng = np.random.default_rng(8)
    for seed in range(10):
        along = np.concatenate([scratch(rng, 10 if len(starts) == 1 else 6, s + rng.uniform(0, 900)) for s in starts])
        found = recurrence.find(along, np.full(along.size, 500.0), 20000.0, seed=seed)
        assert not found.periodic
        assert f"hit in {found.seen} of {found.turns} turns" in recurrence.summary(found)


def test_a_roll_beside_a_scratch_and_one_that_leaves_pieces_are_found():
    rng = np.random.default_rng(9)
    for seed in range(6):
        turns = 700 + 1510 * np.arange(12) + rng.normal(0, 10, 12)
        along = np.concatenate([turns, scratch(rng, 10, rng.uniform(500, 17000))])
        found = recurrence.find(along, np.zeros(along.size), 19000.0, seed=seed)
        assert found.periodic
        assert found.period_mm == pytest.approx(1510, rel=0.01)
        assert set(range(12)) <= set(found.members)
        pieces = np.concatenate([t + np.array([0.0, 9.0, 20.0]) for t in turns])
        broken = recurrence.find(pieces, np.zeros(36), 19000.0, seed=seed)
        assert (broken.periodic, len(broken.members), broken.seen, broken.turns) == (True, 36, 12, 13)


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


@pytest.mark.parametrize(
    ("settings", "least"),
    [({"strips": 0}, 1), ({"least_turns": 5}, 6), ({"most_turns": 7}, 8), ({"seed": -1}, 0)],
)
def test_what_cannot_be_simulated(settings, least):
    ((name, value),) = settings.items()
    with pytest.raises(InputError, match=f"--{name}={value} must be at least {least}"):
        SimulatedRolls(**settings)
    assert SimulatedRolls(**{name: least})


def test_the_binary_writes_what_it_found(tmp_path):
    line = [sys.executable, "-m", "experiments.recurrence", f"--out={tmp_path / 'a.json'}", "--strips=2"]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    assert "right with a period: " in found.stdout
    assert json.loads((tmp_path / "a.json").read_text())["strips"] == {"with a period": 2, "without": 2}
