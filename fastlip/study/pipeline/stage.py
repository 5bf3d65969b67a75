"""A stage of a run, and the seeds of its random draws."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastlip.study.measure.images import Progress


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique name, shown on the terminal and in the timings.
        outputs: files, all of which exist once the stage is done.
        run: carries the stage out; returns its outcome in a few words.
        needs: files that must exist before the stage can begin.
        collective: whether all processes of the group take part; otherwise the leader carries it out alone.
    """

    name: str
    outputs: tuple[Path, ...]
    run: Callable[[Progress], str]
    needs: tuple[Path, ...] = ()
    collective: bool = False

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.outputs)

    @property
    def ready(self) -> bool:
        return all(path.exists() for path in self.needs)


def derived_seed(seed: int, *purpose: str) -> int:
    """A 63-bit seed for one purpose, so that draws for different purposes are independent."""
    digest = hashlib.sha256("/".join(["fastlip.study", str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
