"""Arguments as they were given, checked before any of them reaches torch; errors name them."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard

import numpy as np


def integer(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int; integers of numpy are taken, truth values are not.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below ``least``.
    """
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def number(name: str, value: object, expected: str) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is no real number; the message says what is ``expected``.
        ValueError: it is out of a float's range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, got one that no float holds") from None


def per_axis(name: str, value: object, axes: int, least: int) -> tuple[int, ...]:
    """One integer for all axes, or one for each of them.

    Raises:
        ValueError: ``value`` is neither, or one is below ``least``.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if _is_integer(value):
        given: Sequence[object] = (value,) * axes
    else:
        given = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()
    sizes = tuple(int(v) for v in given if _is_integer(v) and v >= least)
    if len(given) != axes or len(sizes) != axes:
        raise ValueError(f"{name} must be an integer >= {least} or {axes} of them, got {value!r}")
    return sizes


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
