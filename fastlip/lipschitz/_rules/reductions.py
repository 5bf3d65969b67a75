"""Reductions of a tensor to fewer values, and sorting."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call, as_function
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rowwise import by_ends
from fastlip.lipschitz._steps import Step


@builds(torch.mean, torch.sum, "mean", "sum", fixed=True)
def _sum(call: Call) -> Step | None:
    """The sum of m values changes by at most sqrt(m) times the norm of their change; a mean is a sum over m."""
    if not _is_plain(call):
        return None
    terms = math.prod(call.sources[0].shape) / max(math.prod(call.shape), 1)
    factor = terms ** (-0.5 if call.name == "mean" else 0.5) * (1.0 + 1e-15) if terms else 0.0
    apply, count = _apply(call), math.ceil(terms)
    means = by_ends(call, lambda x, *_, **__: apply(x) / (1 if call.name == "mean" else count), terms=max(count, 2))

    def interval(*args: Any, **kwargs: Any) -> Interval:
        y = means(*args, **kwargs)
        return y if call.name == "mean" else arithmetic.scale(y, float(count))

    step = Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval)
    step.linear = True
    return step


@builds(torch.amax, torch.amin, "amax", "amin")
def _extreme(call: Call) -> Step | None:
    """No extreme of a group moves further than the one of its values that moves most."""
    if not _is_plain(call):
        return None
    apply = _apply(call)
    interval = by_ends(call, apply)
    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=apply, interval=interval)


@builds(torch.max, torch.min, torch.sort, torch.topk, "max", "min", "sort", "topk")
@builds(torch.median, torch.kthvalue, "median", "kthvalue")
def _sorted(call: Call) -> Step | Sequence[Step | None] | None:
    """Values in order are no further apart than before (the rearrangement inequality); extremes are among them."""
    if not _is_plain(call):
        return None
    if call.node in call.values.shapes:  # the extreme of all values
        return _extreme(call)
    function, shape = _function(call), call.part_shapes[0]
    assert shape is not None

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        values: Tensor = function(x)[0]
        return values

    return Step(call.where, call.name, call.sources, 1.0, shape, apply=apply), None


@builds(torch.logsumexp, "logsumexp")
def _log_sum_exp(call: Call) -> Step | None:
    """Its gradient consists of probabilities, whose squares sum up to at most 1."""
    if not _is_plain(call):
        return None
    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=_apply(call))


def _is_plain(call: Call) -> bool:
    """Whether only the first argument depends on the input.

    Raises:
        MissingRule: the dtype changes.
    """
    others: list[fx.Node] = []
    fx.node.map_arg((call.args[1:], call.kwargs), others.append)
    if not call.on_one or others:
        return False
    if call.values.dtypes.get(call.node, call.source_dtype) != call.source_dtype:
        raise missing_rule(f"{call.name} to another dtype", call.where)
    return True


def _function(call: Call) -> Callable[[Tensor], Any]:
    """The call as a function of its first argument."""
    function = as_function(call.target)
    return lambda x: function(x, *call.args[1:], **call.kwargs)


def _apply(call: Call) -> Callable[..., Tensor]:
    function = _function(call)
    return lambda x, *_, **__: function(x)
