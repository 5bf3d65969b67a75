"""Checks of single numbers, whose messages name the argument."""

from fastlip._arguments import is_integer, is_number


def integer(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int; a bool is not taken for one.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is below ``least``.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def number(name: str, value: object, expected: str = "a float") -> float:
    """``value`` as a float; a bool is not taken for one.

    Raises:
        TypeError: ``value`` is not a real number; the message says what was ``expected``.
        ValueError: ``value`` is an integer too large for a float.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, got an integer too large for one") from None
