"""Errors under the names that another library has for an attack's arguments."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Where an error begins with a key of ``names``, an argument of fastlip's, say the caller's own name for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        ours, _, rest = str(error).partition(" ")
        # Not those of a subclass, which may be made of other things than a message.
        if type(error) not in (TypeError, ValueError) or ours not in names:
            raise
        raise type(error)(f"{names[ours]} {rest}") from error
