"""Sums, differences and concatenations."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import copies
from fastlip.lipschitz._calls import Call, as_function, with_constants
from fastlip.lipschitz._combinations import BroadcastSum, Combination, Concatenation, Difference, Sum
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Factor, builds, missing_rule
from fastlip.lipschitz._rowwise import aligned, by_ends, constant_sample
from fastlip.lipschitz._steps import Step

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACT = (operator.sub, operator.isub, torch.sub, "sub", "sub_")


@builds(*_ADD, *_SUBTRACT, fixed=True)
def _sum(call: Call) -> Step:
    alpha = call.kwargs.get("alpha", 1)
    if set(call.kwargs) - {"alpha"} or len(call.args) != 2 or not isinstance(alpha, (int, float)):
        raise missing_rule(f"{call.name} with these arguments", call.where)
    times = {0: 1.0, 1: abs(float(alpha))}
    operands = {at: a for at, a in enumerate(call.args) if isinstance(a, fx.Node)}
    inputs = [call.steps[a] for a in operands.values()]
    added = (call.target in _ADD) == (alpha >= 0)
    by: Callable[..., Tensor] = operator.add if call.target in _ADD else operator.sub
    if alpha != 1:
        by = partial(torch.add if call.target in _ADD else torch.sub, alpha=alpha)
    weights = tuple(copies(call.sample_shape(a), call.shape) * times[at] for at, a in operands.items())
    factor: Factor | Combination
    if len(operands) == 1:
        factor = weights[0]  # adding a constant changes no distance
    elif weights != (1.0, 1.0):
        factor = BroadcastSum(weights)
    else:  # x + x counts x twice
        factor = Sum() if added else Difference()

    def interval(*args: Any, **_: Any) -> Interval:
        a, b = (constant_sample(call, a) for a in args)
        if alpha != 1:
            b = arithmetic.scale(b, times[1]) if isinstance(b, Interval) else b * times[1]
        if isinstance(a, Interval) and isinstance(b, Interval):
            return arithmetic.add(a, b) if added else arithmetic.subtract(a, b)
        if isinstance(a, Interval):
            return arithmetic.shift(a, b if added else -b)
        return arithmetic.shift(b if added else arithmetic.negative(b), a)

    combined = with_constants(by, call.args)

    def apply(*args: Any, **_: Any) -> Tensor:
        return combined(*args)

    same = factor == 1.0 and (added or 0 in operands)
    return Step(
        call.where, call.name, inputs, factor, call.shape, apply=apply, interval=aligned(call, interval), same=same
    )


@builds(torch.slice_scatter, torch.select_scatter, fixed=True)
def _overwritten(call: Call) -> Step | None:
    """One tensor with another in place of a part of it: no two elements of the output are the same of an input."""
    nodes = [a for a in call.args[:2] if isinstance(a, fx.Node)]
    if len(call.args) < 2 or len(nodes) != len(call.sources):
        return None
    apply = as_function(call.target)
    factor: Factor | Combination = Concatenation() if len(nodes) > 1 else 1.0
    inputs = [call.steps[node] for node in nodes]
    return Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=by_ends(call, apply))


@builds(torch.stack, torch.cat, torch.concat, torch.concatenate, fixed=True)
@builds(torch.hstack, torch.vstack, torch.dstack, torch.column_stack, fixed=True)
def _concatenation(call: Call) -> Step:
    tensors = call.args[0] if call.args else call.kwargs["tensors"]
    if isinstance(tensors, fx.Node):
        inputs = [part for part in call.bundles[tensors] if part is not None]
    else:
        inputs = [call.steps[a] for a in tensors if isinstance(a, fx.Node)]
    apply = as_function(call.target)
    interval = by_ends(call, apply)
    return Step(call.where, call.name, inputs, Concatenation(), call.shape, apply=apply, interval=interval)
