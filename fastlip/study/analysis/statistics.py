"""Estimates with their sample sizes and intervals, in the form of results.json.

Numbers that do not exist (the interval of a single seed, the median of smallest distortions where most were not found)
are None and never NaN, because results.json is strict JSON.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from fastlip.metrics import censored_median, clopper_pearson, paired_bootstrap
from fastlip.study.storage.schema import Estimate, Proportion

Reduction = Callable[..., Any]


def proportion(hits: np.ndarray, confidence: float) -> Proportion:
    """The proportion of True in ``hits`` [n] bool; the interval is [0, 1] where n is 0."""
    k, n = int(hits.sum()), len(hits)
    if n == 0:
        return Proportion(k=0, n=0, value=None, low=0.0, high=1.0, confidence=confidence)
    found = clopper_pearson(k, n, confidence)
    return Proportion(k=k, n=n, value=found.value, low=found.low, high=found.high, confidence=confidence)


def mean(values: np.ndarray, confidence: float, resamples: int) -> Estimate:
    """The mean of ``values`` [n], all finite, with a percentile bootstrap interval."""
    n = len(values)
    if n == 0:
        return Estimate(n=0, value=None, low=None, high=None, confidence=confidence)
    if n == 1 or np.ptp(values) == 0:
        low = high = _number(values[0]) if n > 1 else None
    else:
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=max(1, 10_000_000 // n),
        ).confidence_interval
        low, high = _number(interval.low), _number(interval.high)
    return Estimate(n=n, value=_number(values.mean()), low=low, high=high, confidence=confidence)


def median(values: np.ndarray, confidence: float) -> Estimate:
    """The median of ``values`` [n], infinite where censored, with an interval between order statistics.

    A limit is None where it is a censored value or n is too small for it.
    """
    if len(values) == 0:
        return Estimate(n=0, value=None, low=None, high=None, confidence=confidence)
    found = censored_median(values, confidence)
    return Estimate(
        n=found.n, value=_number(found.value), low=_number(found.low), high=_number(found.high), confidence=confidence
    )


def paired(a: np.ndarray, b: np.ndarray, statistic: Reduction, confidence: float, resamples: int) -> Estimate:
    """statistic(a) - statistic(b), for values [n] of the same images, with a bootstrap interval over images."""
    if len(a) < 2:
        return Estimate(n=len(a), value=None, low=None, high=None, confidence=confidence)
    found = paired_bootstrap(a, b, statistic, confidence=confidence, resamples=resamples)
    return Estimate(
        n=len(a), value=_number(found.value), low=_number(found.low), high=_number(found.high), confidence=confidence
    )


def over_seeds(differences: np.ndarray, confidence: float) -> Estimate:
    """The mean of one difference per seed with Student's t interval, which a single seed does not have."""
    n = len(differences)
    value = _number(differences.mean()) if n else None
    if n < 2:
        return Estimate(n=n, value=value, low=None, high=None, confidence=confidence)
    if np.ptp(differences) == 0:
        low = high = differences[0]
    else:
        low, high = stats.t.interval(confidence, n - 1, differences.mean(), stats.sem(differences))
    return Estimate(n=n, value=value, low=_number(low), high=_number(high), confidence=confidence)


def over_seeds_p(differences: np.ndarray) -> float | None:
    """Two-sided p-value of Student's t test of a mean difference of 0, one difference per seed; None for one seed."""
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, with bootstrap replicates from resampled runs.

    Attributes:
        value: the correlation of the data; None where a variable is constant or there are fewer than 3 points.
        draws: the correlations of the resamples.
        runs: number of runs, which are the resampled units.
    """

    value: float | None
    draws: np.ndarray
    runs: int

    def estimate(self, confidence: float) -> Estimate:
        """The correlation with its percentile interval; n is the number of runs."""
        if self.value is None or not len(self.draws):
            return Estimate(n=self.runs, value=self.value, low=None, high=None, confidence=confidence)
        low, high = np.quantile(self.draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Estimate(n=self.runs, value=self.value, low=_number(low), high=_number(high), confidence=confidence)

    @property
    def p(self) -> float | None:
        """Two-sided bootstrap p-value of a correlation of 0: the level at which the interval just reaches 0."""
        if self.value is None or not len(self.draws):
            return None
        tail = min(int((self.draws <= 0).sum()), int((self.draws >= 0).sum()))
        return min(1.0, 2 * (tail + 1) / (len(self.draws) + 1))


def spearman(x: np.ndarray, y: np.ndarray, runs: Sequence[object], resamples: int) -> Correlation:
    """Spearman's rank correlation of ``x`` and ``y`` [n]; the bootstrap resamples whole ``runs``.

    The snapshots of one training run are not independent, so the unit is the run. Resamples in which a variable is
    constant have no correlation and are left out.
    """
    names = sorted(set(runs), key=str)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(None, np.zeros(0), len(names))
    members = [np.flatnonzero([run == name for run in runs]) for name in names]
    value = _number(stats.spearmanr(x, y).statistic)
    rng = np.random.default_rng(0)
    draws = []
    for chosen in rng.integers(len(names), size=(resamples if len(names) > 1 else 0, len(names))):
        rows = np.concatenate([members[k] for k in chosen])
        a, b = stats.rankdata(x[rows]), stats.rankdata(y[rows])
        a, b = a - a.mean(), b - b.mean()
        scale = math.sqrt(float(a @ a) * float(b @ b))
        if scale > 0:
            draws.append(float(a @ b) / scale)
    return Correlation(value, np.array(draws), len(names))


def holm(p_values: Sequence[float | None], alpha: float) -> tuple[list[float], list[float]]:
    """Holm's step-down correction (1979) over declared comparisons.

    Args:
        p_values: one for each declared comparison; None, for one that could not be made, counts as 1.
        alpha: probability of any false rejection.

    Returns:
        The adjusted p-values, to be compared with ``alpha``; and the level at which each comparison is tested, which is
        ``alpha`` over the number of comparisons whose p-value is no smaller.
    """
    p = np.array([1.0 if v is None else v for v in p_values])
    order = np.argsort(p, kind="stable")
    left = len(p) - np.arange(len(p))
    adjusted, levels = np.empty(len(p)), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1.0)
    levels[order] = alpha / left
    return adjusted.tolist(), levels.tolist()


def _number(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None
