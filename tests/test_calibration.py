"""Thresholds with a promise: exact numbers, and observed against promised false alarms."""

import numpy as np
import pytest
from scipy import stats

from steel_ad.errors import InputError
from steel_ad.inspection import calibration


@pytest.mark.parametrize(("rate", "average", "confident"), [(0.05, 19, 59), (0.01, 99, 299), (0.002, 499, 1497)])
def test_the_number_of_scores_that_a_promise_takes(rate, average, confident):
    for confidence, count in ((None, average), (0.95, confident)):
        assert calibration.needed(rate, confidence) == count
        found = calibration.promise(np.arange(count), rate, confidence)
        assert (found.rank, found.threshold) == (1, count - 1)
        with pytest.raises(InputError, match=f"it takes {count},"):
            calibration.promise(np.arange(count - 1), rate, confidence)


def test_what_four_hundred_good_scores_promise_at_best():
    found = calibration.promise(np.arange(400), 0.0025)
    assert found.average_rate == 1 / 401
    assert found.confident_rate == pytest.approx(1 - 0.05 ** (1 / 400), rel=1e-9)
    assert calibration.needed(0.001, 0.95) == 2995


@pytest.mark.parametrize("n", [99, 100, 1000, 1999])
def test_the_ranks_are_the_textbook_ones(n):
    rate = 0.01
    found = calibration.promise(np.arange(n), rate)
    assert found.rank == (n + 1) // 100  # in floating point, 2000 (1 - 0.99) is 20 + 2e-14
    assert found.average_rate <= rate < (found.rank + 1) / (n + 1)
    if n >= 299:
        sure = calibration.promise(np.arange(n), rate, 0.95)
        upper = [stats.binomtest(r - 1, n).proportion_ci(0.9, "exact").high for r in (sure.rank, sure.rank + 1)]
        assert upper[0] <= rate < upper[1]
        assert sure.confident_rate == pytest.approx(upper[0], rel=1e-6)


@pytest.mark.parametrize("draw", ["exponential", "normal"])
def test_observed_false_alarms_are_the_promised_ones(draw):
    n, rate, runs = 400, 0.02, 4000
    rng = np.random.default_rng(0)
    scores = getattr(rng, draw)(size=(runs, n))
    rates = {None: [], 0.95: []}
    for row in scores:
        for confidence, seen in rates.items():
            t = calibration.promise(row, rate, confidence).threshold
            seen.append(np.exp(-t) if draw == "exponential" else stats.norm.sf(t))
    # Exact distributions of the true rate of a threshold: Beta(r, n + 1 - r).
    rank = calibration.promise(np.arange(n), rate).rank
    spread = stats.beta(rank, n + 1 - rank).std() / np.sqrt(runs)
    assert np.mean(rates[None]) == pytest.approx(rank / (n + 1), abs=4 * spread)
    sure = calibration.promise(np.arange(n), rate, 0.95)
    kept = stats.beta.cdf(rate, sure.rank, n + 1 - sure.rank)
    assert kept >= 0.95
    assert np.mean(np.array(rates[0.95]) <= rate) == pytest.approx(kept, abs=4 * np.sqrt(kept * (1 - kept) / runs))


def test_one_tile_a_strip_keeps_the_promise_on_correlated_tiles_and_all_tiles_do_not():
    strips, tiles, rate, runs = 60, 30, 0.05, 1500
    rng = np.random.default_rng(1)

    def draw(size):
        return np.repeat(rng.normal(size=(size, 1)), tiles, 1) + 0.3 * rng.normal(size=(size, tiles))

    def true_rate(t):
        return stats.norm.sf(t / np.sqrt(1.09))

    groups = np.repeat(np.arange(strips), tiles).tolist()
    average, confident, naive = [], [], []
    for run in range(runs):
        scores = draw(strips).ravel()
        single = calibration.one_per_group(scores, groups, seed=run)
        assert single.size == strips
        average.append(true_rate(calibration.promise(single, rate).threshold))
        confident.append(true_rate(calibration.promise(single, rate, 0.95).threshold) <= rate)
        naive.append(true_rate(calibration.promise(scores, rate, 0.95).threshold) <= rate)
    promised = calibration.promise(np.arange(strips), rate).average_rate
    assert np.mean(average) == pytest.approx(promised, abs=4 * np.std(average) / np.sqrt(runs))
    assert np.mean(confident) > 0.95 - 4 * np.sqrt(0.95 * 0.05 / runs)
    assert np.mean(naive) < 0.8


def test_the_score_of_a_group_is_drawn_from_all_of_them():
    groups = ["a", "b", "a", "a", "b"]
    seen = {tuple(calibration.one_per_group([0, 1, 2, 3, 4], groups, seed=s)) for s in range(60)}
    assert seen == {(a, b) for a in (0.0, 2.0, 3.0) for b in (1.0, 4.0)}


def test_equal_scores_raise_no_more_alarms_than_promised():
    scores = np.repeat([0.0, 1.0], [90, 9])
    found = calibration.promise(scores, 0.05)
    assert found.threshold == 1.0  # the 5th largest; of good tiles like these, none is above
    assert calibration.promise(np.zeros(99), 0.05).threshold == 0


def test_p_values_count_the_scores_at_least_as_high():
    cal = [1.0, 2.0, 2.0, 3.0]
    scores = [0.5, 1.0, 2.0, 2.5, 3.0, 4.0]
    expected = [(1 + sum(c >= s for c in cal)) / 5 for s in scores]
    assert calibration.p_values(scores, cal).tolist() == expected
    found = calibration.promise(np.arange(199), 0.05)
    p = calibration.p_values([found.threshold, found.threshold + 0.5], np.arange(199))
    assert p[1] <= found.average_rate < p[0]


def test_p_values_of_good_tiles_are_uniform():
    rng = np.random.default_rng(2)
    p = [calibration.p_values(rng.exponential(size=1), rng.exponential(size=19))[0] for _ in range(8000)]
    counts = np.bincount(np.rint(np.array(p) * 20).astype(int), minlength=21)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3


@pytest.mark.slow
def test_the_tail_model_is_scipys_and_covers_the_truth():
    rng = np.random.default_rng(3)
    rate, runs = 1e-4, 12
    covered = np.zeros(2)
    for run in range(runs):
        scores = rng.exponential(2.0, size=600) + 5
        found = calibration.tail(scores, rate)
        truth = 5 + stats.expon.isf(rate, scale=2.0)
        low, high = found.threshold_interval
        covered[0] += low <= truth <= high
        covered[1] += found.rate_interval[0] <= np.exp(-(found.threshold - 5) / 2) <= found.rate_interval[1]
        assert low <= found.threshold <= high
        if run < 3:
            y = scores[scores > found.start] - found.start
            shape, _, scale = stats.genpareto.fit(y, 0.1, floc=0, scale=y.mean())
            assert found.exceedances == 60
            assert found.shape == pytest.approx(shape, abs=2e-3)
            beyond = stats.genpareto.isf(rate / 0.1, shape, scale=scale)
            assert found.threshold - found.start == pytest.approx(beyond, rel=1e-2)
    assert (covered >= stats.binom.ppf(1e-4, runs, 0.93)).all()
    # The unit of the scores does not matter.
    other = calibration.tail(1000 * scores, rate)
    assert other.threshold == pytest.approx(1000 * found.threshold, rel=1e-4)
    assert other.rate_interval == pytest.approx(found.rate_interval, rel=1e-2)


def test_the_tail_model_refuses_what_it_cannot_tell():
    with pytest.raises(InputError, match="300 different"):
        calibration.tail(np.arange(299.0), 1e-4)
    with pytest.raises(InputError, match="300 different"):
        calibration.tail(np.repeat(np.arange(10.0), 100), 1e-4)
    with pytest.raises(InputError, match="not in the tail"):
        calibration.tail(np.arange(1000.0), 0.2)
    ties = np.concatenate([np.full(955, 1.0), 2 + np.arange(45) / 45])
    with pytest.raises(InputError, match=r"only 0\.045"):
        calibration.tail(ties, 0.05)
    assert calibration.tail(ties, 0.01).threshold > 1


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="finite"):
        calibration.promise([1.0, np.nan], 0.5)
    with pytest.raises(ValueError, match="groups"):
        calibration.one_per_group([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="must lie"):
        calibration.promise([1.0], 1.0)
