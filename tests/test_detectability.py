"""Curves of detection recover what trials were drawn from, and their bound covers as often as it says."""

import numpy as np
import pytest
from scipy import special

from steel_ad.inspection import detectability

B0, B1 = -6.0, 3.0
A90 = np.exp((np.log(9) - B0) / B1)


def trials(seed, n):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(2), np.log(40), n))
    return size, rng.random(n) < special.expit(B0 + B1 * np.log(size))


def test_the_fit_is_the_maximum_of_the_likelihood_and_recovers_the_parameters():
    size, hit = trials(0, 20_000)
    curve = detectability.fit(size, hit)
    # The likelihood is concave, and has its maximum where the score equations hold.
    left = hit - special.expit(curve.b0 + curve.b1 * np.log(size))
    np.testing.assert_allclose([left.sum(), (left * np.log(size)).sum()], 0, atol=1e-2)
    assert curve.a50 == pytest.approx(np.exp(2), rel=0.02)
    assert curve.a90 == pytest.approx(A90, rel=0.02)
    assert A90 < curve.a90_95 < 1.05 * A90
    np.testing.assert_allclose(curve([curve.a50, curve.a90]), [0.5, 0.9])
    # In other units the same curve.
    metric = detectability.fit(0.1 * size, hit)
    assert metric.a90_95 == pytest.approx(0.1 * curve.a90_95, rel=1e-4)
    assert metric.b1 == pytest.approx(curve.b1, rel=1e-5)


def test_the_bound_is_where_the_likelihood_ratio_says():
    size, hit = trials(1, 80)
    curve = detectability.fit(size, hit)
    # An independent profile: the intercept follows from the slope.
    slopes = np.linspace(0.01, 12, 4000)[:, None]
    x = np.log(size / curve.a90_95)
    p = special.expit(np.log(9) + slopes * x)
    profile = (-2 * np.log(np.where(hit, p, 1 - p)).sum(1)).min()
    p = curve(size)
    best = -2 * np.log(np.where(hit, p, 1 - p)).sum()
    assert profile - best == pytest.approx(1.6448536**2, abs=2e-3)


def test_the_bound_covers_as_often_as_it_says():
    bounds = [detectability.fit(*trials(seed, 60)).a90_95 for seed in range(200)]
    covered = np.mean([b is None or b >= A90 for b in bounds])
    # Three standard errors around 0.95.
    assert 0.90 < covered < 0.997
    # An infinite bound would cover, too.
    assert sum(b is None for b in bounds) < 10
    assert np.median([b for b in bounds if b is not None]) < 2 * A90


@pytest.mark.parametrize(
    ("size", "hit", "note"),
    [
        ([2, 4, 8], [1, 1, 1], "all of 3 were found: the curve lies below the smallest size, 2"),
        ([2, 4, 8], [0, 0, 0], "none of 3 were found: the curve lies above the largest size, 8"),
        ([2, 4, 8, 16], [0, 0, 1, 1], "all up to 4 were missed and all from 8 found"),
        ([2, 4, 8, 16], [1, 1, 0, 0], "no curve grows"),
        ([2, 4, 4, 8, 8, 16], [1, 1, 0, 1, 0, 0], "were not found more often"),
        ([3, 3, 3], [1, 0, 1], "all sizes are 3"),
    ],
)
def test_trials_without_a_curve_say_why(size, hit, note):
    curve = detectability.fit(size, hit)
    assert note in curve.note
    assert (curve.trials, curve.hits) == (len(size), sum(hit))
    assert curve.a50 is curve.a90 is curve.a90_95 is curve.b1 is None
    with pytest.raises(ValueError, match="no curve"):
        curve(3.0)


def test_an_uncertain_slope_has_no_bound():
    curve = detectability.fit([2, 4, 8, 16, 2, 4, 8, 16], [0, 1, 0, 1, 1, 0, 1, 1])
    assert curve.a90 is not None
    assert curve.a90_95 is None
    assert "no upper bound" in curve.note
    with pytest.raises(ValueError, match="above 0"):
        detectability.fit([0.0, 1.0], [0, 1])
