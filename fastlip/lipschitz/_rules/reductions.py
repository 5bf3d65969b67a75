"""Reductions of a tensor to fewer values, and sorting."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call, as_function
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._samples import increasing, on_samples
from fastlip.lipschitz._steps import Step


@builds(torch.mean, torch.sum, "mean", "sum", fixed=True)
def _sum(call: Call) -> Step | None:
    """The sum of m values changes by at most sqrt(m) times the norm of their change; a mean is a sum over m."""
    if not _is_plain(call):
        return None
    terms = math.prod(call.sources[0].shape) / max(math.prod(call.shape), 1)
    factor = terms ** (-0.5 if call.name == "mean" else 0.5) * (1.0 + 1e-15) if terms else 0.0
    on = _on_samples(call)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        y = arithmetic.monotone_linear(on, x, math.ceil(terms))
        return Interval(y.lower, y.upper, x.norm * (factor * (1.0 + 4.0 * EPS)))

    return Step(call.where, call.name, call.sources, factor, call.shape, apply=_apply(call), interval=interval)


@builds(torch.amax, torch.amin, "amax", "amin")
def _extreme(call: Call) -> Step | None:
    """No extreme of a group moves further than the one of its values that moves most."""
    if not _is_plain(call):
        return None
    interval = increasing(_on_samples(call))
    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=_apply(call), interval=interval)


@builds(torch.max, torch.min, torch.sort, torch.topk, "max", "min", "sort", "topk")
def _sorted(call: Call) -> Step | tuple[Step | None, ...] | None:
    """Values in order are no further apart than before (the rearrangement inequality); extremes are among them."""
    if not _is_plain(call):
        return None
    if call.node in call.values.shapes:  # the extreme of all values
        return _extreme(call)
    function, shape = _function(call), call.values.bundles[call.node][0].shape
    on = on_samples(lambda x: function(x)[0], call.sources[0], call.values.alone(shape), call.values.batch)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        values: Tensor = function(x)[0]
        return values

    sample = call.values.without_batch(shape)
    return Step(call.where, call.name, call.sources, 1.0, sample, apply=apply, interval=increasing(on)), None


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


def _on_samples(call: Call) -> Callable[[Tensor], Tensor]:
    return on_samples(_function(call), call.sources[0], call.alone, call.values.batch)
