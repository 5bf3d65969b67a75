"""Estimates with their sample sizes and intervals, as they stand in results.json.

Numbers that do not exist (an interval of one seed, the median of smallest distortions where most were not found) are
None, never NaN: results.json is strict JSON.
"""

import math
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from scipy import stats

from fastlip.metrics import censored_median, clopper_pearson, paired_bootstrap

Reduction = Callable[..., Any]


class Rate(TypedDict):
    """A share k of n with its exact binomial (Clopper-Pearson) interval."""

    k: int
    n: int
    value: float | None
    low: float
    high: float
    confidence: float


class Estimate(TypedDict):
    """A number computed from n observations with its interval."""

    n: int
    value: float | None
    low: float | None
    high: float | None
    confidence: float


def rate(hits: np.ndarray, confidence: float) -> Rate:
    """Share of True in ``hits`` [n] bool; the interval is [0, 1] where n is 0."""
    k, n = int(hits.sum()), len(hits)
    if n == 0:
        return Rate(k=0, n=0, value=None, low=0.0, high=1.0, confidence=confidence)
    found = clopper_pearson(k, n, confidence)
    return Rate(k=k, n=n, value=found.value, low=found.low, high=found.high, confidence=confidence)


def mean(values: np.ndarray, confidence: float, resamples: int) -> Estimate:
    """Mean of ``values`` [n], all finite, with a percentile bootstrap interval over them."""
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
    """Median of ``values`` [n], infinite where censored, with the interval between order statistics.

    A limit that falls on a censored value, or that n is too small for, is None.
    """
    if len(values) == 0:
        return Estimate(n=0, value=None, low=None, high=None, confidence=confidence)
    found = censored_median(values, confidence)
    return Estimate(
        n=found.n, value=_number(found.value), low=_number(found.low), high=_number(found.high), confidence=confidence
    )


def paired(a: np.ndarray, b: np.ndarray, statistic: Reduction, confidence: float, resamples: int) -> Estimate:
    """statistic(a) - statistic(b) for values [n] of the same images, with a bootstrap interval over images."""
    if len(a) < 2:
        return Estimate(n=len(a), value=None, low=None, high=None, confidence=confidence)
    found = paired_bootstrap(a, b, statistic, confidence=confidence, resamples=resamples)
    return Estimate(
        n=len(a), value=_number(found.value), low=_number(found.low), high=_number(found.high), confidence=confidence
    )


def over_seeds(differences: np.ndarray, confidence: float) -> Estimate:
    """Mean of one difference per seed with Student's t interval; no interval below two seeds."""
    n = len(differences)
    value = _number(differences.mean()) if n else None
    if n < 2:
        return Estimate(n=n, value=value, low=None, high=None, confidence=confidence)
    low, high = stats.t.interval(confidence, n - 1, differences.mean(), stats.sem(differences))
    if np.ptp(differences) == 0:
        low = high = differences[0]
    return Estimate(n=n, value=value, low=_number(low), high=_number(high), confidence=confidence)


def spearman(x: np.ndarray, y: np.ndarray, confidence: float, resamples: int) -> Estimate:
    """Spearman's rank correlation of ``x`` and ``y`` [n], its percentile interval from resampled pairs.

    Each pair is one trained model, the unit that is independent. Resamples in which either side is constant have no
    correlation and are left out.
    """
    n = len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(n=n, value=None, low=None, high=None, confidence=confidence)
    rows = np.random.default_rng(0).integers(n, size=(resamples, n))
    a, b = stats.rankdata(x[rows], axis=1), stats.rankdata(y[rows], axis=1)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    draws = (a * b).sum(1)[scale > 0] / scale[scale > 0]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = stats.spearmanr(x, y).statistic
    return Estimate(n=n, value=_number(value), low=_number(low), high=_number(high), confidence=confidence)


def _number(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None
