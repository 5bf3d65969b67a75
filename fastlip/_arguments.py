"""Checks of arguments that norms and attacks share; errors name the argument as the caller knows it."""

from numbers import Integral, Real
from typing import TypeGuard


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, including NumPy's; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, including NumPy's; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def integer(value: object, name: str, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is below ``least``.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def number(value: object, name: str, expected: str) -> float:
    """``value`` as a float.

    Raises:
        TypeError: ``value`` is not a real number; the message says what is ``expected``.
        ValueError: ``value`` is outside a float's range.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, got one that no float holds") from None
