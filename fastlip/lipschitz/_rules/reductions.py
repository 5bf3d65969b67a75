"""Reductions of a tensor to fewer values."""

import math

import torch

from fastlip.lipschitz._calls import Call, as_function
from fastlip.lipschitz._registry import builds
from fastlip.lipschitz._rowwise import by_ends
from fastlip.lipschitz._steps import Step


@builds(torch.mean, "mean", fixed=True)
def _mean(call: Call) -> Step | None:
    if not call.on_one:
        return None
    # The mean of m values changes by at most 1/sqrt(m) times the norm of their change.
    ratio = math.prod(call.sources[0].shape) / max(math.prod(call.shape), 1)
    factor = ratio**-0.5 * (1.0 + 1e-15)
    apply, count = as_function(call.target), math.ceil(ratio)
    interval = by_ends(call, apply, terms=max(count, 2))
    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval)
