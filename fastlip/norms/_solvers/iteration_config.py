"""What the iterations share: their configuration, their results, and the limits of a device."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class IterationConfig:
    """Everything that must be settled before the first random number is drawn.

    Attributes:
        eta: probability that each operator's upper side may fail with.
        starts: independent start vectors per operator.
        rtol: relative width at which an operator stops.
        max_steps: steps after which an operator stops in any case.
        dtype: arithmetic of the iteration.
        generator: source of the start vectors.
        keep_vectors: whether results hold the vector that attains the lower side, float64.
    """

    eta: float
    starts: int
    rtol: float
    max_steps: int
    dtype: torch.dtype
    generator: torch.Generator
    keep_vectors: bool = False


class IterationResult(NamedTuple):
    """Result for one operator, in the scale of its normalised weight; the Ritz vector where it is to be kept."""

    lower: float
    upper: float
    steps: int
    vector: Tensor | None = None


class DeviceLimits(NamedTuple):
    """How much a kind of device handles at once."""

    steps: int  # fewest steps between two stopping tests
    ahead: int  # steps to go on with while the host computes a stopping test
    elements: int  # elements of vectors that are brought to float64 at a time
    working_set: int  # bytes that operators may take whose a-posteriori bounds are computed together


#: On a CPU launches are cheap. Vectors in float64 should stay in cache there, and memory that is used again costs no
#: page faults. On a GPU a stopping test takes as long as several steps, and a launch as long as much of the work: two
#: steps are launched before each test's result is known, in vain for the operators that then end.
DEVICE_LIMITS = {"cpu": DeviceLimits(1, 0, 1 << 17, 1 << 24), "cuda": DeviceLimits(6, 2, 1 << 25, 1 << 29)}


def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of such a device."""
    return DEVICE_LIMITS["cpu" if device.type == "cpu" else "cuda"]
