"""Estimates with their sample sizes and intervals, in the form of results.json.

Numbers that do not exist (the interval of a single seed, the median of smallest distortions where most were not found)
are None and never NaN, because results.json is strict JSON.
"""

import math
import warnings
from functools import lru_cache

import numpy as np
from scipy import stats

from fastlip.metrics import censored_median, clopper_pearson
from fastlip.study.storage.schema import Estimate, Proportion


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
        low = high = number(values[0]) if n > 1 else None
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
        low, high = number(interval.low), number(interval.high)
    return Estimate(n=n, value=number(values.mean()), low=low, high=high, confidence=confidence)


def median(values: np.ndarray, confidence: float) -> Estimate:
    """The median of ``values`` [n], infinite where censored, with an interval between order statistics.

    A limit is None where it is a censored value or n is too small for it.
    """
    if len(values) == 0:
        return Estimate(n=0, value=None, low=None, high=None, confidence=confidence)
    found = censored_median(values, confidence)
    return Estimate(
        n=found.n, value=number(found.value), low=number(found.low), high=number(found.high), confidence=confidence
    )


def relative_difference(
    under: tuple[np.ndarray, np.ndarray],  # [n] bool, each
    clean: tuple[np.ndarray, np.ndarray],  # [n] bool, each
    confidence: float,
    resamples: int,
) -> Estimate:
    """Accuracy under attack over clean accuracy, of the first model minus the second, with a bootstrap interval.

    Images are resampled with all their decisions kept together. The number does not exist where a model classifies no
    image correctly, and the interval does not where that is so in a resample.
    """

    def difference(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, axis: int) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(a.sum(axis) / c.sum(axis) - b.sum(axis) / d.sum(axis))

    data, n = (*under, *clean), len(under[0])
    if n < 2:
        return Estimate(n=n, value=None, low=None, high=None, confidence=confidence)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns about its own interval where no resample differs
        draws = stats.bootstrap(
            data,
            difference,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=max(1, 4_000_000 // n),
        ).bootstrap_distribution
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(difference(*data, axis=-1))
    return Estimate(n=n, value=number(value), low=number(low), high=number(high), confidence=confidence)


#: Values that logarithms and differences, distortions and ratios, and accuracies can have.
ANY, NOT_NEGATIVE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)


def over_seeds(numbers: np.ndarray, confidence: float, possible: tuple[float, float] = ANY) -> Estimate:
    """The mean of one number per seed with Student's t interval, which a single seed does not have.

    Args:
        numbers: one for each seed, [S].
        confidence: of the interval.
        possible: what the numbers can be at all; the interval ends there.
    """
    n = len(numbers)
    value = number(numbers.mean()) if n else None
    if n < 2:
        return Estimate(n=n, value=value, low=None, high=None, confidence=confidence)
    low, high = np.clip(student_limits(numbers, confidence), *possible)
    return Estimate(n=n, value=value, low=number(float(low)), high=number(float(high)), confidence=confidence)


def over_seeds_p(differences: np.ndarray) -> float | None:
    """Two-sided p-value of Student's t test of a mean difference of 0, one difference per seed; None for one seed."""
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def number(value: float | np.floating) -> float | None:
    """A float, or None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def median_limits(
    values: np.ndarray,  # [..., n]
    confidence: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Distribution-free limits of the median over the last dimension; infinite where n is too small for them.

    Values may be infinite: the limits are order statistics.
    """
    first, last = _median_ranks(values.shape[-1], confidence)
    if first is None or last is None:
        shape = values.shape[:-1]
        return np.full(shape, -np.inf), np.full(shape, np.inf)
    ordered = np.partition(values, (first, last), axis=-1)
    return ordered[..., first], ordered[..., last]


@lru_cache
def _median_ranks(n: int, confidence: float) -> tuple[int | None, int | None]:
    """The ranks, from 0, of the order statistics of n values that SciPy's interval of their median lies between."""
    if n == 0:
        return None, None
    interval = stats.quantile_test(np.arange(n), p=0.5).confidence_interval(confidence)
    first, last = (None if np.isnan(limit) else int(limit) for limit in interval)
    return first, last


def censored_difference(
    low: np.ndarray,  # [n]
    high: np.ndarray,  # [n]
    confidence: float,
) -> Estimate:
    """Median of differences that lie between ``low`` (may be -inf) and ``high`` (may be inf).

    The interval holds wherever the differences lie. The value is the middle of the smallest and the largest possible
    median.
    """
    if len(low) == 0:
        return Estimate(n=0, value=None, low=None, high=None, confidence=confidence)
    least, most = median_limits(low, confidence)[0], median_limits(high, confidence)[1]
    with np.errstate(invalid="ignore"):  # the median of an even number of values may be inf - inf
        value = float(np.median(low) + np.median(high)) / 2
    return Estimate(
        n=len(low), value=number(value), low=number(float(least)), high=number(float(most)), confidence=confidence
    )


def mean_difference(
    a: np.ndarray,  # [n]
    b: np.ndarray,  # [n]
    confidence: float,
) -> Estimate:
    """mean(a) - mean(b) over the same images, with Student's t interval."""
    return over_seeds(a.astype(float) - b, confidence)


def student_limits(
    values: np.ndarray,  # [..., n]
    confidence: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Student's t limits of the mean over the last dimension, n at least 2; NaN where a value is."""
    n = values.shape[-1]
    middle = values.mean(-1)
    half = stats.t.isf((1 - confidence) / 2, n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return middle - half, middle + half


def spearman(
    x: np.ndarray,  # [..., n]
    y: np.ndarray,  # [..., n]
) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rank correlation over the last dimension, and its two-sided p-value by permutation.

    A variable that is constant has no correlation: NaN, with a p-value of 1. The permutation distribution is that of
    values without ties; it is exact for n up to 7.
    """
    a, b = (stats.rankdata(v, axis=-1) for v in (x, y))
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    with np.errstate(invalid="ignore"):  # 0 / 0, a constant
        rho = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    null, exact = _null(x.shape[-1])
    # Rounding must not make equal correlations unequal.
    above = len(null) - np.searchsorted(null, np.abs(rho) - 1e-9)
    p = np.where(np.isnan(rho), 1.0, (above + (not exact)) / (len(null) + (not exact)))
    return rho, p


@lru_cache
def _null(n: int) -> tuple[np.ndarray, bool]:
    """Sorted absolute rank correlations of n ranks with their permutations; whether these are all permutations."""
    ranks = np.arange(n) - (n - 1) / 2

    def rho(permuted: np.ndarray, axis: int) -> np.ndarray:
        return np.tensordot(permuted, ranks, ([axis], [0])) / (ranks @ ranks)

    resamples = 9999
    found = stats.permutation_test(
        (ranks,), rho, permutation_type="pairings", vectorized=True, n_resamples=resamples, rng=np.random.default_rng(0)
    ).null_distribution
    return np.sort(np.abs(found)), math.factorial(n) <= resamples


def correlation_limits(
    rho: np.ndarray,
    n: int,
    confidence: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Limits of Spearman's correlations ``rho`` of n observations (Bonett and Wright 2000); -1 and 1 where n < 4."""
    if n < 4:
        return np.full_like(rho, -1.0), np.full_like(rho, 1.0)
    middle = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    half = stats.norm.isf((1 - confidence) / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return np.tanh(middle - half), np.tanh(middle + half)


def partial_spearman(
    x: np.ndarray,  # [R, E]
    y: np.ndarray,  # [R, E]
    controls: np.ndarray,  # [K, R, E]
    resamples: int,
) -> tuple[float, float]:
    """Rank correlation of ``x`` and ``y`` partial on ``controls``, with a two-sided p-value by permuting whole runs.

    Args:
        x: values of R runs at E moments, the same in each run.
        y: like ``x``.
        controls: K further variables.
        resamples: number of permutations; all are tried if there are no more.

    Returns:
        The correlation, NaN where it does not exist; and its p-value, 1 for a single run, which cannot be permuted.
    """
    ranks = [stats.rankdata(v).reshape(v.shape) for v in (x, y, *controls)]
    known = np.stack([np.ones(x.size), *(v.ravel() for v in ranks[2:])], 1)
    a, b = (v - (known @ np.linalg.lstsq(known, v.ravel())[0]).reshape(v.shape) for v in ranks[:2])
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    # With as many controls as points nothing but rounding is left of the ranks.
    if x.size < known.shape[1] + 2 or scale < 1e-9 * x.size**3:
        return math.nan, 1.0
    of_pair = np.einsum("ie,je->ij", a, b) / scale
    runs = np.arange(len(x))
    if len(runs) < 2:
        return float(of_pair.sum()), 1.0

    def correlation(permuted: np.ndarray, axis: int) -> np.ndarray:
        return of_pair[permuted, runs].sum(axis)

    found = stats.permutation_test(
        (runs,),
        correlation,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(0),
    )
    return float(found.statistic), float(found.pvalue)


def split_half_reliability(
    values: np.ndarray,  # [R, N]
    splits: int = 200,
) -> float | None:
    """Reliability of the means of R runs over N images (Spearman 1910, Brown 1910), 0 where it comes out negative.

    The correlation between the means over two halves of the images, averaged over random halves, and stepped up to
    all images. None where there are fewer than 3 runs or 4 images, or the runs do not differ.
    """
    runs, images = values.shape
    if runs < 3 or images < 4:
        return None
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(images), (splits, 1)), axis=1)
    half = images // 2
    one, other = values[:, order[:, :half]].mean(-1), values[:, order[:, half:]].mean(-1)  # [R, splits]
    one, other = one - one.mean(0), other - other.mean(0)
    scale = np.sqrt((one * one).sum(0) * (other * other).sum(0))
    if not (scale > 0).all():
        return None
    r = max(float(((one * other).sum(0) / scale).mean()), 0.0)
    return 2 * r / (1 + r)
