"""Arithmetic on log10 of bounds, which may overflow a float; every result is rounded upwards."""

import math
from collections.abc import Iterable

#: Relative error per term of a sum of powers.
_POWERS = 4e-15


def log10(x: float) -> float:
    """Logarithm of x, rounded upwards; -inf for 0."""
    if x == 0.0:
        return -math.inf
    return 0.0 if x == 1.0 else math.nextafter(math.log10(x), math.inf)


def exp10(log: float) -> float:
    """10 to the power ``log``, rounded upwards; inf if it overflows a float."""
    if log == -math.inf:
        return 0.0
    if log >= 308.25:
        return math.inf
    return 1.0 if log == 0.0 else math.nextafter(10.0**log, math.inf)


def multiply(a: float, b: float) -> float:
    """Logarithm of a product; 0 times anything is 0, even if the other factor overflowed."""
    if a == -math.inf or b == -math.inf:
        return -math.inf
    total = a + b
    if math.isinf(total):
        return total
    # The rounding error of the addition, exactly (Knuth's two-sum).
    part = total - a
    lost = (a - (total - part)) + (b - part)
    return math.nextafter(total, math.inf) if lost > 0.0 else total


def add(logs: Iterable[float]) -> float:
    """Logarithm of a sum."""
    terms = list(logs)
    largest = max(terms)
    if math.isinf(largest):
        return largest
    if terms.count(-math.inf) == len(terms) - 1:
        return largest
    total = sum(10.0 ** (log - largest) for log in terms)
    return multiply(largest, log10(total * (1.0 + _POWERS * len(terms) + _spread(terms, largest))))


def _spread(terms: list[float], largest: float) -> float:
    """Relative error of the powers that comes from rounding the differences of large logarithms."""
    return 2.0 * math.log(10.0) * max(math.ulp(largest - log) for log in terms if log > -math.inf)


def half(log: float) -> float:
    """Logarithm of a square root."""
    return 0.5 * log
