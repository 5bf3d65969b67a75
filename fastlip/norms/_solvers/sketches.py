"""The Gaussian vectors that measure the rounding of an iteration."""

import math
from dataclasses import dataclass

import torch

from fastlip.norms._solvers.certificate import sketch_scale
from fastlip.norms._solvers.iteration_config import IterationConfig


@dataclass(frozen=True)
class Sketches:
    """Gaussian vectors to measure ||F|| with.

    Attributes:
        amount: number of vectors z.
        scale: the bound ||F|| <= max ||F z|| / scale fails with the probability that is set aside for it.
    """

    amount: int
    scale: float


def choose_sketches(config: IterationConfig, eta: float, least_overlap: float) -> Sketches:
    """Enough Gaussian vectors, each of which costs one application in float64; they fail with probability ``eta``.

    The rounding expected of a usual number of steps should be a small part of the overlap, the smaller the narrower
    the interval that is asked for.
    """
    share = 0.3 if config.rtol >= 5e-3 else 0.04 if config.rtol >= 5e-4 else 0.0
    for amount in range(4, 17):
        scale = sketch_scale(eta, amount)
        if expected_rounding(config.dtype, 40 * config.starts, scale) <= share * least_overlap:
            break
    return Sketches(amount, scale)


def expected_rounding(dtype: torch.dtype, columns: int, scale: float) -> float:
    """What the bound on ||F|| usually comes to, in units of sigma_1^2: about one unit of rounding in each column."""
    return 1.1 * torch.finfo(dtype).eps * math.sqrt(columns) / scale
