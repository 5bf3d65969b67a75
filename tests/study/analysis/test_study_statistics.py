import math

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.statistics import (
    censored_difference,
    correlation_limits,
    mean,
    mean_difference,
    median,
    median_limits,
    over_seeds,
    over_seeds_p,
    partial_spearman,
    proportion,
    relative_difference,
    spearman,
    split_half_reliability,
    student_limits,
)


def test_rate_is_scipys_exact_interval():
    found = proportion(np.arange(96) < 85, 0.95)
    expected = stats.binomtest(85, 96).proportion_ci(0.95, method="exact")
    assert (found["k"], found["n"], found["value"]) == (85, 96, 85 / 96)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rate_of_nothing_says_nothing():
    found = proportion(np.zeros(0, dtype=bool), 0.95)
    assert (found["value"], found["low"], found["high"]) == (None, 0.0, 1.0)


def test_mean_covers_the_normal_interval_of_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = mean(values, 0.95, 2000)
    half = 1.96 * 2.0 / np.sqrt(2000)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.02)


@pytest.mark.parametrize("values", [[], [2.0]])
def test_a_mean_without_spread_to_resample_has_no_interval(values):
    found = mean(np.array(values), 0.95, 100)
    assert found["n"] == len(values)
    assert (found["low"], found["high"]) == (None, None)


def test_a_constant_has_an_interval_of_no_width():
    found = mean(np.full(5, 2.0), 0.95, 100)
    assert (found["low"], found["value"], found["high"]) == (2.0, 2.0, 2.0)


def test_median_interval_is_scipys_quantile_test():
    values = np.random.default_rng(1).exponential(size=101)
    found = median(values, 0.95)
    expected = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert found["value"] == np.median(values)
    assert found["low"] == pytest.approx(expected.low)
    assert found["high"] == pytest.approx(expected.high)


def test_a_median_above_the_censoring_does_not_exist():
    found = median(np.array([1.0, 2.0, np.inf, np.inf, np.inf]), 0.95)
    assert found["value"] is None


def test_over_seeds_is_students_interval():
    differences = np.array([0.1, 0.3, 0.2, 0.25])
    found = over_seeds(differences, 0.9875)
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.9875)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_an_interval_ends_where_the_numbers_must():
    shares = np.array([0.2, 0.05, 0.9])
    free, within = over_seeds(shares, 0.95), over_seeds(shares, 0.95, (0.0, 1.0))
    assert free["low"] < 0.0 < 1.0 < free["high"]
    assert within == free | {"low": 0.0, "high": 1.0}


def test_one_seed_has_no_interval():
    found = over_seeds(np.array([0.1]), 0.95)
    assert (found["n"], found["value"], found["low"], found["high"]) == (1, 0.1, None, None)


def test_over_seeds_p_is_students_test_and_agrees_with_its_interval():
    differences = np.array([0.1, 0.3, 0.2, 0.25])
    p = over_seeds_p(differences)
    assert p == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue)
    assert over_seeds(differences, 1 - p)["low"] == pytest.approx(0.0, abs=1e-9)
    assert over_seeds_p(np.array([0.1])) is None
    assert (over_seeds_p(np.full(3, 0.2)), over_seeds_p(np.zeros(3))) == (0.0, 1.0)


def test_median_limits_are_those_of_scipy_in_every_row():
    rows = np.random.default_rng(2).normal(size=(3, 4, 37))
    low, high = median_limits(rows, 0.9)
    for at in np.ndindex(3, 4):
        expected = stats.quantile_test(rows[at], p=0.5).confidence_interval(0.9)
        assert (low[at], high[at]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_few_values_do_not_limit_their_median(n):
    low, high = median_limits(np.zeros((2, n)), 0.95)
    assert np.isneginf(low).all()
    assert np.isposinf(high).all()


def test_a_censored_difference_is_limited_wherever_it_may_lie():
    rng = np.random.default_rng(0)
    known = rng.normal(size=60)
    low, high = known.copy(), known.copy()
    low[:4], high[4:8] = -np.inf, np.inf
    found = censored_difference(low, high, 0.95)
    for _ in range(100):
        filled = known.copy()
        filled[:4] -= rng.exponential(5.0, 4)
        filled[4:8] += rng.exponential(5.0, 4)
        inner = stats.quantile_test(filled, p=0.5).confidence_interval(0.95)
        assert found["low"] <= inner.low
        assert inner.high <= found["high"]
        assert found["low"] < np.median(filled) < found["high"]
    assert found["value"] == pytest.approx((np.median(low) + np.median(high)) / 2)


def test_a_median_that_may_lie_anywhere_does_not_exist():
    found = censored_difference(np.full(20, -np.inf), np.full(20, np.inf), 0.95)
    assert (found["value"], found["low"], found["high"]) == (None, None, None)


def test_student_limits_are_scipys_in_every_row():
    rows = np.random.default_rng(1).normal(size=(2, 3, 5))
    low, high = student_limits(rows, 0.9)
    expected = stats.ttest_1samp(rows, 0.0, axis=-1).confidence_interval(0.9)
    np.testing.assert_allclose((low, high), (expected.low, expected.high))


def test_a_mean_difference_is_the_paired_t_interval():
    a, b = np.random.default_rng(0).random((2, 50)) < [[0.8], [0.5]]
    found = mean_difference(a, b, 0.95)
    expected = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(0.95)
    assert found["value"] == pytest.approx(a.mean() - b.mean())
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_a_relative_difference_divides_each_model_by_its_own_clean_accuracy():
    rng = np.random.default_rng(0)
    clean = rng.random((2, 400)) < [[0.9], [0.5]]
    under = clean & (rng.random((2, 400)) < [[0.6], [0.4]])
    found = relative_difference(tuple(under), tuple(clean), 0.95, 2000)
    shares = under.sum(1) / clean.sum(1)
    assert found["value"] == pytest.approx(shares[0] - shares[1])
    # Two independent proportions of so many images.
    half = 1.96 * math.sqrt((shares * (1 - shares) / clean.sum(1)).sum())
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.01)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.01)


def test_a_model_that_is_never_right_has_no_relative_accuracy():
    right, wrong = np.ones(9, dtype=bool), np.zeros(9, dtype=bool)
    found = relative_difference((wrong, right), (wrong, right), 0.95, 100)
    assert (found["value"], found["low"], found["high"]) == (None, None, None)


@pytest.mark.parametrize("n", [6, 12])
def test_spearman_is_scipys_correlation_and_permutation_test(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        x, e = rng.normal(size=(2, n))
        y = x + e
        rho, p = spearman(x, y)
        expected = stats.permutation_test(
            (x,),
            lambda v, y=y: stats.spearmanr(v, y).statistic,
            permutation_type="pairings",
            n_resamples=1000,
            rng=np.random.default_rng(0),
        )
        assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
        assert p == pytest.approx(expected.pvalue, abs=1e-9 if n < 7 else 0.06)


def test_spearman_rejects_unrelated_values_as_often_as_its_level():
    x, y = np.random.default_rng(0).normal(size=(2, 4000, 8))
    p = spearman(x, y)[1]
    assert 0.04 < (p <= 0.05).mean() < 0.06


def test_a_constant_has_no_correlation():
    rho, p = spearman(np.ones(6), np.arange(6.0))
    assert np.isnan(rho)
    assert p == 1.0


def test_correlation_limits_cover():
    rng = np.random.default_rng(0)
    rho, n = 0.6, 20
    r = 2 * math.sin(math.pi * rho / 6)
    x, e = rng.normal(size=(2, 2000, n))
    low, high = correlation_limits(spearman(x, r * x + math.sqrt(1 - r * r) * e)[0], n, 0.95)
    assert 0.93 < ((low < rho) & (rho < high)).mean() < 0.98


def test_three_runs_limit_no_correlation():
    low, high = correlation_limits(np.array([1.0]), 3, 0.95)
    assert (low[0], high[0]) == (-1.0, 1.0)


def test_a_partial_correlation_is_that_of_the_residuals_of_the_ranks():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 5, 4))
    x, y = x + 2 * z, y + 2 * z
    rho = {
        pair: stats.spearmanr(a.ravel(), b.ravel()).statistic
        for pair, a, b in (("xy", x, y), ("xz", x, z), ("yz", y, z))
    }
    expected = (rho["xy"] - rho["xz"] * rho["yz"]) / math.sqrt((1 - rho["xz"] ** 2) * (1 - rho["yz"] ** 2))
    assert partial_spearman(x, y, z[None], 100)[0] == pytest.approx(expected)


def test_a_partial_correlation_permutes_whole_runs():
    # Within each of three runs both sides agree perfectly, but three runs have only six orders.
    runs = np.repeat(np.random.default_rng(0).normal(size=3), 10).reshape(3, 10)
    rho, p = partial_spearman(runs, runs, np.broadcast_to(np.arange(10.0), (1, 3, 10)), 1000)
    assert rho == pytest.approx(1.0)
    assert p >= 1 / 6


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_a_partial_correlation_of_too_few_points_does_not_exist(shape):
    x, y, *controls = np.random.default_rng(0).normal(size=(4, *shape))
    rho, p = partial_spearman(x, y, np.array(controls), 100)
    assert np.isnan(rho)
    assert p == 1.0


def test_one_run_has_a_partial_correlation_that_cannot_be_tested():
    x, y, z = np.random.default_rng(0).normal(size=(3, 1, 9))
    rho, p = partial_spearman(x, y, z[None], 100)
    assert -1 < rho < 1
    assert p == 1.0


@pytest.mark.parametrize("images", [50, 200])
def test_reliability_is_that_of_its_definition(images):
    # Runs of variance 1, and images of variance 25 in each: the mean over n images has reliability 1 / (1 + 25 / n).
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 1)) + 5 * rng.normal(size=(400, images)) + 10 * rng.normal(size=images)
    assert split_half_reliability(values) == pytest.approx(1 / (1 + 25 / images), abs=0.05)


def test_runs_that_do_not_differ_have_no_reliability():
    assert split_half_reliability(np.ones((5, 10))) is None
    assert split_half_reliability(np.random.default_rng(0).normal(size=(2, 10))) is None
    assert split_half_reliability(np.random.default_rng(0).normal(size=(5, 3))) is None
