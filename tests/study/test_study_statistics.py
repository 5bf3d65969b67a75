import numpy as np
import pytest
from scipy import stats

from fastlip.study.statistics import mean, median, over_seeds, paired, rate, spearman


def test_rate_is_scipys_exact_interval():
    found = rate(np.arange(96) < 85, 0.95)
    expected = stats.binomtest(85, 96).proportion_ci(0.95, method="exact")
    assert (found["k"], found["n"], found["value"]) == (85, 96, 85 / 96)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rate_of_nothing_says_nothing():
    found = rate(np.zeros(0, dtype=bool), 0.95)
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


def test_one_seed_has_no_interval():
    found = over_seeds(np.array([0.1]), 0.95)
    assert (found["n"], found["value"], found["low"], found["high"]) == (1, 0.1, None, None)


def test_spearman_value_and_a_planted_correlation():
    x = np.arange(20.0)
    y = x + np.random.default_rng(0).normal(size=20)
    found = spearman(x, y, 0.95, 1000)
    assert found["value"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["low"] > 0.8
    assert found["low"] <= found["value"] <= found["high"] + 1e-12


def test_spearman_without_correlation_does_not_exclude_zero():
    rng = np.random.default_rng(4)
    found = spearman(rng.normal(size=30), rng.normal(size=30), 0.95, 1000)
    assert found["low"] < 0 < found["high"]


def test_paired_difference_keeps_the_pairs():
    x = np.random.default_rng(0).normal(0, 100, 50)
    found = paired(x + 1.0, x, np.mean, 0.95, 500)
    assert (found["low"], found["value"], found["high"]) == pytest.approx((1.0, 1.0, 1.0))
