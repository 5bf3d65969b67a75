"""One stage of a run, and the seeds of what it draws."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastlip.study.measure.images import Progress


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique, as shown and timed.
        outputs: files that are all there once it is done.
        run: does it; returns a few words on what came out.
        needs: files that must be there before it can begin.
        collective: whether all processes of a group take part; otherwise its leader does it alone.
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
    """A 63-bit seed for one purpose, so that no two draws of a run share a stream."""
    digest = hashlib.sha256("/".join(["fastlip.study", str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
