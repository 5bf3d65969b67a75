"""Untrusted text, made safe to print."""


def printable(text: str) -> str:
    r"""``text`` with everything that could control a terminal replaced by escapes.

    Control characters, direction marks, line separators and lone surrogates become ``\x1b``, ``\u202e`` and the like.
    Letters of every language and the plain space are kept.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
