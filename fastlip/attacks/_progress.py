"""Progress of an evaluation, shown by tqdm."""

import sys
from collections.abc import Callable
from typing import Any

from fastlip.attacks._arguments import flag

#: Called with the images done, the images in all (-1 where that is unknown) and the name of the attack. The first call
#: for an attack has 0 done, or as many as need it no more.
Progress = Callable[[int, int, str], None]


def progress_of(progress: bool | Progress | type[Any]) -> Progress:
    """``progress`` itself where it is a function; else one that shows bars on standard error, or nothing.

    A class of tqdm's (``tqdm.tqdm``, ``tqdm.notebook.tqdm``) makes the bars itself.
    """
    if isinstance(progress, type) and hasattr(progress, "update"):
        return _Bar(progress)
    if callable(progress):
        return progress
    return _bar() if flag(progress, "progress") else _nothing


def _nothing(done: int, total: int, name: str) -> None:
    pass


def _bar() -> Progress:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        # The evaluation does not depend on the bar, so that it goes on without one.
        print('fastlip: no progress is shown without tqdm: pip install "fastlip[progress]"', file=sys.stderr)
        return _nothing
    return _Bar(tqdm)


class _Bar:
    """One line for each attack."""

    def __init__(self, tqdm: Any) -> None:
        self.tqdm = tqdm
        self.lines: dict[str, Any] = {}

    def __call__(self, done: int, total: int, name: str) -> None:
        line = self.lines.get(name)
        if line is None:
            known = total if total >= 0 else None
            line = self.lines[name] = self.tqdm(total=known, desc=name, unit="image")
        line.update(done - line.n)
        if 0 <= total <= done:
            line.close()
