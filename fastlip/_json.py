"""Results that are read back from JSON."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reading(cls: type[object]) -> Iterator[None]:
    """Say in the error about JSON what it should have been.

    Raises:
        ValueError: something was missing, or of another type.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"this is not the JSON of a {cls.__name__}: {reason}") from None
