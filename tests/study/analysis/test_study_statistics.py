import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.statistics import holm, mean, median, over_seeds, over_seeds_p, paired, proportion, spearman


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


def test_spearman_value_and_a_planted_correlation():
    x = np.arange(20.0)
    y = x + np.random.default_rng(0).normal(size=20)
    found = spearman(x, y, list(range(20)), 1000)
    estimate = found.estimate(0.95)
    assert estimate["value"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert estimate["low"] > 0.8
    assert estimate["low"] <= estimate["value"] <= estimate["high"] + 1e-12
    assert found.p == pytest.approx(2 / 1001)


def test_spearman_with_runs_of_one_point_is_scipys_bootstrap():
    rng = np.random.default_rng(3)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    found = spearman(x, y, list(range(40)), 4000).estimate(0.9)
    expected = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_spearman_without_correlation_does_not_exclude_zero():
    rng = np.random.default_rng(4)
    found = spearman(rng.normal(size=30), rng.normal(size=30), list(range(30)), 1000)
    assert found.estimate(0.95)["low"] < 0 < found.estimate(0.95)["high"]
    assert found.p > 0.05


def test_spearman_resamples_whole_runs():
    # Within each run of ten both sides agree perfectly, but the runs are three draws of nothing: their points must not
    # count as thirty.
    rng = np.random.default_rng(0)
    runs = [r for r in range(3) for _ in range(10)]
    x = np.repeat(rng.normal(size=3), 10) + 1e-3 * rng.normal(size=30)
    y = np.repeat(rng.normal(size=3), 10) + 1e-3 * rng.normal(size=30)
    by_run = spearman(x, y, runs, 1000).estimate(0.95)
    by_point = spearman(x, y, list(range(30)), 1000).estimate(0.95)
    assert by_run["n"] == 3
    assert by_run["high"] - by_run["low"] > 2 * (by_point["high"] - by_point["low"])


@pytest.mark.parametrize(("x", "runs"), [([1.0, 2.0], [0, 1]), ([1.0, 1.0, 1.0], [0, 1, 2])])
def test_spearman_that_does_not_exist(x, runs):
    found = spearman(np.array(x), np.arange(float(len(x))), runs, 100)
    assert found.value is None
    assert found.p is None
    assert found.estimate(0.95)["low"] is None


def test_one_run_has_a_correlation_and_no_interval():
    found = spearman(np.arange(5.0), np.arange(5.0), [0] * 5, 100)
    assert found.value == pytest.approx(1.0)
    assert found.p is None
    assert found.estimate(0.95)["low"] is None


def test_holm_is_the_step_down_procedure():
    p = [0.01, 0.04, 0.03, 0.005]
    adjusted, levels = holm(p, 0.05)
    # By hand: 0.005*4, 0.01*3, 0.03*2, then 0.04*1 raised to its predecessor's.
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert levels == pytest.approx([0.05 / 3, 0.05, 0.05 / 2, 0.05 / 4])


def test_holm_rejects_what_stepping_down_rejects():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.uniform(size=6) ** 3
        adjusted, levels = holm(p.tolist(), 0.05)
        rejected = np.zeros(6, dtype=bool)
        for k in np.argsort(p):
            if p[k] > levels[k]:
                break
            rejected[k] = True
        np.testing.assert_array_equal(np.array(adjusted) <= 0.05, rejected)


def test_holm_counts_a_comparison_that_could_not_be_made():
    assert holm([0.02, None, None], 0.05)[0] == pytest.approx([0.06, 1.0, 1.0])


def test_paired_difference_keeps_the_pairs():
    x = np.random.default_rng(0).normal(0, 100, 50)
    found = paired(x + 1.0, x, np.mean, 0.95, 500)
    assert (found["low"], found["value"], found["high"]) == pytest.approx((1.0, 1.0, 1.0))
