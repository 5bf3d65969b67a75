"""Error messages with the names that another library gives to an attack's arguments."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Replace a key of ``names``, an argument of fastlip's, at the start of an error message by the caller's name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        ours, _, rest = str(error).partition(" ")
        # Errors of a subclass pass unchanged, because their constructors may take more than a message.
        if type(error) not in (TypeError, ValueError) or ours not in names:
            raise
        raise type(error)(f"{names[ours]} {rest}") from error
