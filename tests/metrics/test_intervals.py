import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from fastlip import metrics


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (90, 96), (1, 1), (5000, 10000)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_clopper_pearson_is_the_beta_quantile_interval(k, n, confidence):
    rate = metrics.clopper_pearson(k, n, confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else stats.beta.ppf(tail, k, n - k + 1)
    high = 1.0 if k == n else stats.beta.ppf(1 - tail, k + 1, n - k)
    assert rate.value == k / n
    assert rate.low == pytest.approx(low, abs=1e-9)
    assert rate.high == pytest.approx(high, abs=1e-9)
    assert (rate.successes, rate.n, rate.confidence) == (k, n, confidence)


def test_clopper_pearson_of_the_seed_deck():
    # 90 of 96 images: the interval that a clean accuracy of 93.75% carries with it.
    rate = metrics.clopper_pearson(90, 96)
    assert rate.low == pytest.approx(0.869, abs=1e-3)
    assert rate.high == pytest.approx(0.977, abs=1e-3)


@pytest.mark.parametrize(("k", "n", "confidence"), [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (1, 5, 1.0)])
def test_clopper_pearson_errors(k, n, confidence):
    with pytest.raises(ValueError, match="must"):
        metrics.clopper_pearson(k, n, confidence)


def test_clopper_pearson_takes_whole_numbers_of_any_type():
    plain = metrics.clopper_pearson(3, 10)
    for number in (np.int64, float, torch.tensor):
        rate = metrics.clopper_pearson(number(3), number(10))
        assert rate == plain
        assert type(rate.value) is float
    with pytest.raises(ValueError, match="whole numbers"):
        metrics.clopper_pearson(2.5, 10)


def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a = rng.normal(size=80)
    b = a + rng.normal(0.2, 0.1, size=80)
    ours = metrics.paired_bootstrap(a, b, np.median)
    peer = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.median(x, axis=axis) - np.median(y, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert ours.value == np.median(a) - np.median(b)
    assert ours.low == pytest.approx(peer.low, abs=0.03)
    assert ours.high == pytest.approx(peer.high, abs=0.03)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    a = rng.normal(scale=10, size=200)
    difference = metrics.paired_bootstrap(a + 0.1 + 0.01 * rng.normal(size=200), a)
    assert difference.excludes(0.0)
    assert difference.low < 0.1 < difference.high
    assert difference.high - difference.low < 0.01


def test_paired_bootstrap_covers():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        a, b = rng.normal(1.0, 1.0, size=40), rng.normal(size=40)
        interval = metrics.paired_bootstrap(a, b, resamples=400, seed=seed)
        covered += interval.low <= 1.0 <= interval.high
    assert covered >= 175


def test_paired_bootstrap_is_seeded():
    a, b = np.arange(20.0), np.arange(20.0)[::-1]
    assert metrics.paired_bootstrap(a, b, seed=1) == metrics.paired_bootstrap(a, b, seed=1)
    assert metrics.paired_bootstrap(a, b, seed=1) != metrics.paired_bootstrap(a, b, seed=2)


def test_paired_bootstrap_with_censored_values():
    a, b = np.array([1.0, 2, 3, 4, math.inf] * 20), np.array([0.5, 1, 1.5, 2, 2.5] * 20)
    interval = metrics.paired_bootstrap(a, b, np.median)
    assert (interval.value, interval.low > 0) == (1.5, True)
    both = metrics.paired_bootstrap(np.full(5, math.inf), np.full(5, math.inf), np.median)
    assert math.isnan(both.value)
    assert math.isnan(both.low)
    assert not both.excludes(0.0)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1.0], [1.0], {}, "length of at least 2"),
        ([1.0, 2.0], [1.0], {}, "one length"),
        ([[1.0, 2.0]], [[1.0, 2.0]], {}, "vectors"),
        ([1.0, 2.0], [1.0, 2.0], {"resamples": 0}, "resamples"),
        ([1.0, 2.0], [1.0, 2.0], {"confidence": 95}, "confidence"),
    ],
)
def test_paired_bootstrap_errors(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        metrics.paired_bootstrap(a, b, **options)


@pytest.mark.parametrize("n", [6, 7, 50, 333])
def test_censored_median_agrees_with_scipy_quantile_test(n):
    values = np.random.default_rng(n).exponential(size=n)
    ours = metrics.censored_median(values)
    # SciPy's interval is one-sided where asked: two of 97.5% make the two-sided one of 95%.
    low = stats.quantile_test(values, q=0, p=0.5, alternative="greater").confidence_interval(0.975).low
    high = stats.quantile_test(values, q=0, p=0.5, alternative="less").confidence_interval(0.975).high
    assert ours.value == np.median(values)
    assert (ours.low, ours.high) == (low, high)
    assert ours.found == ours.n == n


def test_censoring_above_the_median_changes_only_what_it_must():
    values = np.arange(1.0, 102.0)
    censored = np.where(values > 80, np.inf, values)
    plain, cut = metrics.censored_median(values), metrics.censored_median(censored)
    assert (plain.value, plain.low, plain.high) == (cut.value, cut.low, cut.high)
    assert cut.found == 80
    assert metrics.censored_median(np.where(values > 55, np.inf, values)).high == math.inf
    assert metrics.censored_median(np.where(values > 40, np.inf, values)).value == math.inf


def test_few_values_give_no_interval():
    found = metrics.censored_median([1.0, 2.0, 3.0])
    assert (found.low, found.value, found.high) == (-math.inf, 2.0, math.inf)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_censored_median_errors(values):
    with pytest.raises(ValueError, match="values must hold"):
        metrics.censored_median(values)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'pip install "fastlip\[study\]"'):
        metrics.clopper_pearson(1, 2)
