"""Text from strangers' files, made safe to print."""


def printable(text: str) -> str:
    r"""``text`` with everything that a terminal could take for a command written out as an escape.

    Control characters, marks that turn the direction of writing, line separators and lone surrogates become ``\x1b``,
    ``\u202e`` and the like; letters of every language and the plain space stay.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
