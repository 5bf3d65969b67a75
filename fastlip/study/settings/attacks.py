"""Settings of the attacks: noise, PGD, the stronger suite, and searches for the smallest perturbations."""

from dataclasses import dataclass
from typing import Literal

#: A ball around an image: the norm, the radius as the settings state it, and the radius for pixels in [0, 1].
Ball = tuple[Literal["linf", "l2", "l1"], float, float]


@dataclass(frozen=True)
class GaussianSettings:
    """Gaussian noise at fixed strengths; ``sigmas`` are standard deviations of pixels in [0, 1]."""

    sigmas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class PgdSettings:
    """PGD at fixed strengths.

    Attributes:
        linf_255: radii of the Linf ball in 255ths of the pixel range.
        l2: radii of the L2 ball, pixels in [0, 1].
        l1: radii of the L1 ball, pixels in [0, 1].
        steps: gradient steps.
        relative_step: step size times ``steps`` over the radius.
        loss: "dlr" or "ce".
        restarts: number of random starts; the strongest result of them counts.
    """

    linf_255: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    l2: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    l1: tuple[float, ...] = (1.0, 3.0, 6.0)
    steps: int = 10
    relative_step: float = 2.5
    loss: Literal["dlr", "ce"] = "dlr"
    restarts: int = 1

    @property
    def grid(self) -> list[Ball]:
        """All balls that are attacked."""
        return _balls(self.linf_255, self.l2, self.l1)


@dataclass(frozen=True)
class StrongSuiteSettings:
    """The stronger suite: an image counts as robust only where none of the attacks succeeds.

    Attributes:
        linf_255: radii of the Linf ball in 255ths of the pixel range.
        l2: radii of the L2 ball, pixels in [0, 1].
        steps: gradient steps of APGD, for cross-entropy and for each target.
        restarts: number of random starts of APGD with cross-entropy.
        targets: number of wrong classes, in order of likelihood, that targeted APGD tries one by one.
        queries: forward passes of the black-box attack (Square).
    """

    linf_255: tuple[float, ...] = (1.0,)
    l2: tuple[float, ...] = (0.25,)
    steps: int = 20
    restarts: int = 1
    targets: int = 3
    queries: int = 200

    @property
    def grid(self) -> list[Ball]:
        """All balls that are attacked."""
        return _balls(self.linf_255, self.l2, ())


@dataclass(frozen=True)
class SmallestSettings:
    """Searches for the smallest L2 perturbation of each image that changes the decision.

    Attributes:
        steps: gradient steps of PGD at each radius.
        searches: number of radii tried.
        directions: number of Gaussian directions drawn for each image.
        max_sigma: largest noise level tried.
        levels: number of noise levels tried before bisection.
        halvings: bisections of the noise level after the first success.
    """

    steps: int = 10
    searches: int = 8
    directions: int = 4
    max_sigma: float = 4.0
    levels: int = 11
    halvings: int = 5


def _balls(linf_255: tuple[float, ...], l2: tuple[float, ...], l1: tuple[float, ...]) -> list[Ball]:
    found: list[Ball] = [("linf", v, v / 255) for v in linf_255]
    found += [("l2", v, v) for v in l2]
    return found + [("l1", v, v) for v in l1]
