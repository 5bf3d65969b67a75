"""Euclidean distances to constant points or between traced tensors."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlip.lipschitz._calls import Call, with_constants
from fastlip.lipschitz._combinations import BroadcastSum, Combination
from fastlip.lipschitz._intervals import EPS, INF, Interval
from fastlip.lipschitz._registry import Factor, builds, missing_rule
from fastlip.lipschitz._steps import Step


@builds(torch.cdist)
def _distances(call: Call) -> Step | None:
    return _step(call, ("x1", "x2", "p", "compute_mode"))


@builds(F.pairwise_distance)
def _distance(call: Call) -> Step | None:
    return _step(call, ("x1", "x2", "p", "eps", "keepdim"))


def _step(call: Call, names: tuple[str, ...]) -> Step | None:
    """The step of distances between points, the last axes of two tensors, each of which is used equally often.

    A distance moves by no more than each of its points, and the constant of a tensor is the root of how many distances
    each of its points has.
    """
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    pair = [given.get("x1"), given.get("x2")]
    if call.kwargs.keys() & {"x1", "x2"} or isinstance(given.get("p"), fx.Node):
        return None
    if float(given.get("p", 2.0)) != 2.0:
        raise missing_rule(f"{call.name} in another norm than L2", call.where)
    nodes = [t for t in pair if isinstance(t, fx.Node)]
    counts = [math.prod(call.shape) / max(math.prod(call.sample_shape(t)[:-1]), 1) for t in nodes]
    times = tuple(math.sqrt(count) * (1.0 + 2.0 * EPS) for count in counts)
    factor: Factor | Combination = times[0] if len(nodes) == 1 else BroadcastSum(times)
    combined = with_constants(lambda *args: call.target(*args, **call.kwargs), call.args)

    def apply(*args: Any, **_: Any) -> Tensor:
        return combined(*args)

    def interval(*args: Any, **_: Any) -> Interval:
        like = next(a for a in args if isinstance(a, Interval)).lower
        low: Tensor = like.new_zeros(len(like), *call.shape)
        return Interval(low, torch.full_like(low, INF))

    inputs = [call.steps[t] for t in nodes]
    return Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=interval)
