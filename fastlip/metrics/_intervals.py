"""Confidence intervals of rates, differences and medians."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastlip.metrics._extra import scipy_stats

Statistic = Callable[..., NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Example:
        >>> import fastlip
        >>> interval = fastlip.metrics.Interval(0.5, 0.25, 0.75)
    """

    value: float
    low: float
    high: float
    confidence: float

    def excludes(self, number: float) -> bool:
        """Whether ``number`` lies outside the interval."""
        return number < self.low or number > self.high


@dataclass(frozen=True)
class Rate(Interval):
    """A share of successes with its Clopper-Pearson interval."""

    successes: int
    n: int


@dataclass(frozen=True)
class CensoredMedian(Interval):
    """The median of values that may be censored at inf; it is inf where more than half of them are."""

    found: int
    n: int


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Rate:
    """Share of ``successes`` among ``n`` with its exact binomial interval (Clopper and Pearson 1934).

    Args:
        successes: number of successes, 0 .. n.
        n: number of trials, at least 1.
        confidence: least coverage of the interval.

    Raises:
        ValueError: a number is out of range.
        ImportError: SciPy is missing.

    Example:
        >>> import fastlip
        >>> print(fastlip.metrics.clopper_pearson(45, 100))
    """
    _check_confidence(confidence)
    if int(n) != n or int(successes) != successes:
        raise ValueError(f"successes and n must be whole numbers, got {successes} of {n}")
    successes, n = int(successes), int(n)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0 .. n and n be at least 1, got {successes} of {n}")
    found = scipy_stats().binomtest(successes, n).proportion_ci(confidence, method="exact")
    return Rate(successes / n, float(found.low), float(found.high), confidence, successes, n)


def paired_bootstrap(
    a: ArrayLike,  # [N]
    b: ArrayLike,  # [N]
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Interval of statistic(a) - statistic(b), where a[i] and b[i] were measured on the same image.

    Images are resampled with their pairs kept together (percentile bootstrap, Efron 1979).

    Args:
        a: values of one arm, [N]; inf denotes a censored value, which only rank statistics such as the median take.
        b: values of the other arm, [N].
        statistic: reduces an array along its last axis: called as ``statistic(values, axis=-1)``.
        confidence: coverage of the interval.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.

    Returns:
        The difference and its interval. A difference of two infinite statistics is not a number; where resamples
        contain such differences the interval's ends are NaN.

    Raises:
        ValueError: the shapes differ, there are fewer than 2 pairs, or a number is out of range.
        ImportError: SciPy is missing.

    Example:
        >>> import fastlip
        >>> print(fastlip.metrics.paired_bootstrap([1.0, 2.0, 3.0], [0.5, 1.5, 3.5], resamples=99))
    """
    _check_confidence(confidence)
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or one.size < 2:
        raise ValueError(f"a and b must be vectors of one length of at least 2, got {one.shape} and {other.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")

    def difference(x: NDArray[np.float64], y: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return statistic(x, axis=axis) - statistic(y, axis=axis)

    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns about its own interval, which cannot hold censored values
        value = float(difference(one, other, -1))
        differences = (
            scipy_stats()
            .bootstrap(
                (one, other),
                difference,
                paired=True,
                vectorized=True,
                n_resamples=resamples,
                batch=max(1, _BOOTSTRAP_ELEMENTS // one.size),
                method="percentile",
                rng=np.random.default_rng(seed),
            )
            .bootstrap_distribution
        )
    if np.isnan(differences).any():
        return Interval(value, float("nan"), float("nan"), confidence)
    tail = (1 - confidence) / 2
    # SciPy's own limits are not used: they interpolate, which gives NaN between infinite differences.
    low, high = np.quantile(differences, [tail, 1 - tail], method="nearest")
    return Interval(value, float(low), float(high), confidence)


def censored_median(values: ArrayLike, confidence: float = 0.95) -> CensoredMedian:
    """Median of right-censored distances (inf where none was found) with a distribution-free interval.

    The interval is a pair of order statistics whose ranks follow from the binomial distribution. It depends on the
    order of the values alone, so that censoring above the median does not matter and a censored end is inf.

    Args:
        values: distances, [N]; inf where censored.
        confidence: least coverage of the interval.

    Raises:
        ValueError: there are no values, one is a NaN, or ``confidence`` is out of range.
        ImportError: SciPy is missing.

    Example:
        >>> import fastlip
        >>> print(fastlip.metrics.censored_median([1.0, 2.0, 3.0, 4.0, 5.0, float("inf")]))
    """
    _check_confidence(confidence)
    data = np.sort(np.asarray(values, dtype=np.float64).ravel())
    if data.size == 0 or np.isnan(data).any():
        raise ValueError("values must hold at least one number and no NaN")
    n = data.size
    interval = scipy_stats().quantile_test(data, p=0.5).confidence_interval(confidence)
    # SciPy's limits are NaN where n is too small for them.
    low = -np.inf if np.isnan(interval.low) else interval.low
    high = np.inf if np.isnan(interval.high) else interval.high
    lower, upper = data[(n - 1) // 2], data[n // 2]
    value = lower if lower == upper else (lower + upper) / 2
    found = int(np.isfinite(data).sum())
    return CensoredMedian(float(value), float(low), float(high), confidence, found, n)


#: How many resampled elements are held at a time, which bounds the memory of a bootstrap over many images.
_BOOTSTRAP_ELEMENTS = 4_000_000


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
