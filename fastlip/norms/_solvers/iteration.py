"""What the iterations share: their starts, and the rounding they are charged for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlip.norms._operators.composed import AnyOperator
from fastlip.norms._solvers.certificate import Array

Indices = NDArray[np.int64]

_UNIT = 2.0**-53


class Grain(NamedTuple):
    """What a kind of device handles at once."""

    steps: int  # fewest between two looks at the coefficients
    ahead: int  # steps to go on with while the host looks
    elements: int  # of vectors that are brought to float64 at a time
    working_set: int  # bytes that operators measured together may take


#: On a CPU launches are cheap; vectors in float64 shall stay in cache, and memory that is used again costs no page
#: faults. On a GPU a look at the coefficients takes as long as several steps, and a launch as long as much of the work:
#: a pair of steps is in hand meanwhile, which is in vain for the operators that end.
GRAINS = {"cpu": Grain(1, 0, 1 << 17, 1 << 24), "cuda": Grain(6, 2, 1 << 25, 1 << 29)}


def grain(device: torch.device) -> Grain:
    """What such a device handles at once."""
    return GRAINS["cpu" if device.type == "cpu" else "cuda"]


class IterationResult(NamedTuple):
    """Result for one operator, in the scale of its normalised weight; the Ritz vector where the config keeps it."""

    lower: float
    upper: float
    steps: int
    vector: Tensor | None = None


@dataclass(frozen=True)
class IterationConfig:
    """Everything that must be settled before the first random number is drawn.

    Attributes:
        eta: probability each operator's upper side may fail with.
        starts: independent starts per operator.
        rtol: relative width to stop at.
        max_steps: steps to stop at in any case.
        dtype: arithmetic of the iteration.
        generator: source of the starts.
        keep_vectors: whether results hold the vector that attains the lower side, float64.
    """

    eta: float
    starts: int
    rtol: float
    max_steps: int
    dtype: torch.dtype
    generator: torch.Generator
    keep_vectors: bool = False


def on_device(config: IterationConfig, device: torch.device) -> IterationConfig:
    """The config with a generator on the operators' GPU, seeded by its own: a CPU draws more slowly than they run."""
    if device.type != "cuda" or config.generator.device.type == "cuda":
        return config
    seed = int(torch.randint(2**63 - 1, (), generator=config.generator))
    return replace(config, generator=torch.Generator(device).manual_seed(seed))


def draw_starts(sizes: Sequence[int], config: IterationConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Independent uniform draws from the unit spheres of R^size, in the config's arithmetic.

    Drawn in float64 on the generator's device, where neighbours of one size are handled together. Returns the starts of
    all operators, [starts, size] each, flat, and how far rounding moved the furthest of each operator's, [operators],
    as a tensor there, which the host has not waited for.
    """
    total, home = config.starts * sum(sizes), config.generator.device
    exact = torch.randn(total, dtype=torch.float64, generator=config.generator, device=home)
    for rows in rows_by_size(exact, sizes, config.starts):
        rows /= torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    rounded = exact.to(config.dtype, copy=True)
    exact -= rounded
    moved = [torch.linalg.vector_norm(rows, dim=2).amax(1) for rows in rows_by_size(exact, sizes, config.starts)]
    return rounded.to(device), torch.cat(moved) + 1e-15


def rows_by_size(flat: Tensor, sizes: Sequence[int], starts: int) -> Iterator[Tensor]:
    """Views [operators, starts, size] of runs of operators of equal size, in ``flat`` one after the other."""
    at = 0
    for size, run in groupby(sizes):
        count = len(list(run))
        end = at + count * starts * size
        yield flat[at:end].view(count, starts, size)
        at = end


def norm_errors(ops: Sequence[AnyOperator], sizes: Indices) -> Array:
    """Relative error of a quotient of two float64 norms, of vectors in each operator's range and domain.

    ``sizes`` are the dimensions of the domains.
    """
    return 4.0 * _UNIT * (sizes + np.array([math.prod(op.output_shape) for op in ops]) + 4)
