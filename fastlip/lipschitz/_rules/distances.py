"""Euclidean distances to constant points or between traced tensors."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlip.lipschitz._broadcast import copies
from fastlip.lipschitz._calls import Call, with_constants
from fastlip.lipschitz._combinations import BroadcastSum, Combination
from fastlip.lipschitz._intervals import EPS, INF, Interval
from fastlip.lipschitz._registry import Factor, builds, missing_rule
from fastlip.lipschitz._steps import Step


@builds(torch.cdist)
def _distances(call: Call) -> Step | None:
    """Each point has a distance to each of the others, which moves by no more than the point."""
    given = dict(zip(("x1", "x2", "p", "compute_mode"), call.args, strict=False)) | call.kwargs
    return _step(call, given, tuple(math.sqrt(call.shape[axis]) for axis in (-1, -2)) if call.shape[1:] else ())


@builds(F.pairwise_distance)
def _distance(call: Call) -> Step | None:
    given = dict(zip(("x1", "x2", "p", "eps", "keepdim"), call.args, strict=False)) | call.kwargs
    pair = [given.get(name) for name in ("x1", "x2")]
    shapes = [call.sample_shape(t) if isinstance(t, fx.Node) else tuple(getattr(t, "shape", ())) for t in pair]
    largest = torch.broadcast_shapes(*shapes)
    return _step(call, given, tuple(copies(shape, largest) for shape in shapes))


def _step(call: Call, given: dict[str, Any], times: tuple[float, ...]) -> Step | None:
    """The step of a function of two tensors ``x1`` and ``x2``, whose constants are so many times the distance's."""
    pair = [given.get(name) for name in ("x1", "x2")]
    if len(times) != 2 or call.kwargs.keys() & {"x1", "x2"} or any(isinstance(given.get(k), fx.Node) for k in ("p",)):
        return None
    if float(given.get("p", 2.0)) != 2.0:
        raise missing_rule(f"{call.name} in another norm than L2", call.where)
    own = [time * (1.0 + 2.0 * EPS) for t, time in zip(pair, times, strict=True) if isinstance(t, fx.Node)]
    inputs = [call.steps[t] for t in pair if isinstance(t, fx.Node)]
    factor: Factor | Combination = own[0] if len(own) == 1 else BroadcastSum(tuple(own))
    shape = call.shape

    def interval(*args: Any, **_: Any) -> Interval:
        like = next(a for a in args if isinstance(a, Interval)).lower
        low: Tensor = like.new_zeros(len(like), *shape)
        return Interval(low, torch.full_like(low, INF))

    apply = with_constants(lambda *args: call.target(*args, **call.kwargs), call.args)
    return Step(
        *(call.where, call.name, inputs, factor, shape),
        apply=lambda *args, **_: apply(*args),
        interval=interval,
    )
