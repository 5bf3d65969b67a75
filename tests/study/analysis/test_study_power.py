"""The needed sample sizes against simulation and against their definitions."""

import math

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.power import images_needed, runs_needed, sample_sizes, seeds_needed
from fastlip.study.settings.rules import Rules


def chance(n, share, threshold=0.9, confidence=0.95):
    """Probability of a lower limit above the threshold, summed over all outcomes."""
    k = np.arange(n + 1)
    low = np.array([stats.binomtest(int(i), n).proportion_ci(confidence).low for i in k])
    return stats.binom.pmf(k, n, share)[low > threshold].sum()


@pytest.mark.parametrize("share", [0.97, 0.99, 1.0])
def test_images_needed_is_where_the_chance_reaches_the_power(share):
    n = images_needed(share, 0.9, 0.95, 0.8)
    assert chance(n, share) >= 0.8
    assert chance(n - 1, share) < 0.8


def test_images_needed_where_all_agree_is_known_in_closed_form():
    assert images_needed(1.0, 0.9, 0.95, 0.8) == math.ceil(math.log(0.025) / math.log(0.9))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_no_number_of_images_shows_what_is_not_so(share):
    assert images_needed(share, 0.9, 0.95, 0.8) is None


def test_seeds_needed_by_simulation():
    n = seeds_needed(2.0, 0.05, 0.8)
    draws = np.random.default_rng(0).normal(2.0, 1.0, (4000, n))
    assert (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean() >= 0.78
    fewer = draws[:, : n - 1]
    assert (stats.ttest_1samp(fewer, 0.0, axis=1).pvalue < 0.05).mean() < 0.8


def test_runs_needed_by_simulation():
    n = runs_needed(0.7, 0.05, 0.8)
    # Pearson's r whose normal scores have Spearman's rho of 0.7.
    r = 2 * math.sin(math.pi * 0.7 / 6)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        x, e = rng.normal(size=(2, n))
        found += stats.spearmanr(x, r * x + math.sqrt(1 - r * r) * e).pvalue < 0.05
    assert 0.72 < found / 1000 < 0.9


def test_the_plan_covers_every_question_and_wants_no_less_than_the_rules():
    rows = sample_sizes(Rules(min_seeds=50, min_runs=500))
    assert {row["question"] for row in rows} == {1, 2, 3, 4}
    assert all(row["needed"] >= 50 for row in rows if row["question"] == 3)
    assert all(row["needed"] >= 500 for row in rows if row["question"] == 4)
    assert all(row["had"] is None for row in rows)
