"""A progress line for a terminal."""

import sys
import time
from collections.abc import Callable

from fastlip.attacks._arguments import flag

Progress = Callable[[int, int, str], None]

_WIDTH = 24


def shower(progress: bool | Progress) -> Progress:
    """What to call with images done, images in all and a name: a bar on standard error, nothing, or ``progress``."""
    if callable(progress):
        return progress
    return Bar() if flag(progress, "progress") else lambda done, total, name: None


class Bar:
    """One line on standard error, with the time left; a new line for each name."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def __call__(self, done: int, total: int, name: str) -> None:
        if done == 0:
            self.begin = time.perf_counter()
        spent = time.perf_counter() - self.begin
        filled = _WIDTH * done // total if total else _WIDTH
        left = f", {spent * (total - done) / done:.0f} s left" if 0 < done < total else f", {spent:.1f} s"
        end = "\n" if done >= total else ""
        line = f"\r{name:<14} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total}{left}"
        print(line.ljust(79), end=end, file=sys.stderr, flush=True)
