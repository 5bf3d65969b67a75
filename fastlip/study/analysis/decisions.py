"""The rules of the verdicts as functions of arrays, for one study or for many simulated ones at once.

Leading dimensions [...] are those of the studies. The decisions are 1 for "supported", -1 for "contradicted" and 0 for
"undetermined". NaN, for what does not exist, decides nothing.
"""

import math

import numpy as np

from fastlip.study.analysis.statistics import correlation_limits, spearman, student_limits
from fastlip.study.settings.rules import Rules
from fastlip.study.storage.schema import VerdictName

NAMES: dict[int, VerdictName] = {1: "supported", -1: "contradicted", 0: "undetermined"}


def over_images_and_seeds(
    low: np.ndarray,  # [...]
    high: np.ndarray,  # [...]
    seeds: np.ndarray,  # [..., S]
    rules: Rules,
) -> tuple[np.ndarray, np.ndarray]:
    """Limits over images, widened to contain Student's t interval over S seeds' numbers from ``min_seeds`` seeds on."""
    if seeds.shape[-1] < rules.min_seeds:
        return low, high
    below, above = student_limits(seeds, rules.confidence)
    return np.minimum(low, below), np.maximum(high, above)


def ratios(
    low: np.ndarray,  # [..., R]
    high: np.ndarray,  # [..., R]
    gain: np.ndarray,  # [...]
    rules: Rules,
) -> np.ndarray:
    """Questions 1 and 2.

    Args:
        low: lower limits of the difference of log ratios from each of R references.
        high: the upper limits.
        gain: lower limits of the difference in clean accuracy from softmax regression.
        rules: the numbers.
    """
    margin = math.log(rules.ratio_margin)
    deep = gain > rules.nonlinear_gain
    return np.where(deep, (high <= margin).all(-1).astype(int) - (low > margin).all(-1).astype(int), 0)


def rises(
    differences: np.ndarray,  # [..., B, 2, S]
    rules: Rules,
) -> np.ndarray:
    """Question 3, from S seeds' differences of log distortion and of relative accuracy against each of B baselines.

    The last baseline is the one that decides about "contradicted".
    """
    if differences.shape[-1] < rules.min_seeds:
        return np.zeros(differences.shape[:-3], dtype=int)
    low, high = student_limits(differences, rules.confidence)
    supported = (low > 0).all((-2, -1))
    margins = np.array([math.log(rules.distortion_margin), rules.accuracy_margin])
    contradicted = (high[..., -1, :] < margins).all(-1) & ~supported
    return supported.astype(int) - contradicted.astype(int)


def correlations(
    rho: np.ndarray,  # [..., C]
    p: np.ndarray,  # [..., C]
    runs: int,
    reliability: float,
    rules: Rules,
) -> np.ndarray:
    """Question 4, from C correlations over ``runs`` runs of distortions that have this ``reliability``."""
    found = (p <= 1 - rules.confidence).all(-1) & (np.abs(np.sign(rho).sum(-1)) == rho.shape[-1])
    low, high = correlation_limits(rho, runs, rules.confidence)
    limit = rules.correlation * math.sqrt(reliability)
    excluded = ((low > -limit) & (high < limit)).all(-1) & ~found
    return found.astype(int) - excluded.astype(int)


def correlations_of(
    instability: np.ndarray,  # [..., C, runs]
    distortion: np.ndarray,  # [..., C, runs]
    reliability: float,
    rules: Rules,
) -> np.ndarray:
    """Question 4, from the final models of runs."""
    return correlations(*spearman(instability, distortion), distortion.shape[-1], reliability, rules)
