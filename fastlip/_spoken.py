"""Words of long work, for logs: a line a minute, where no terminal shows a bar."""

import time
from collections.abc import Callable


class Spoken:
    """Pass on a line where none was passed on for a while.

    Args:
        say: takes a line.
        silent: say nothing, where a bar is shown in its place.
        seconds: time between lines.
    """

    def __init__(self, say: Callable[[str], object], *, silent: bool, seconds: float = 60.0) -> None:
        self._say, self._silent, self._seconds = say, silent, seconds
        self.said()

    def said(self) -> None:
        """Take note that something else was said just now."""
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        if not self._silent and time.monotonic() - self._last >= self._seconds:
            self.said()
            self._say(line)
