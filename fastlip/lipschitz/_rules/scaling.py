"""Multiplication and division of a traced tensor by what does not depend on the input."""

import operator
from typing import Any

import torch
from torch import fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import largest_slice
from fastlip.lipschitz._calls import Call, with_constants
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import Diagonal, Factor, builds, missing_rule
from fastlip.lipschitz._rowwise import aligned, constant_sample
from fastlip.lipschitz._steps import Step


@builds(operator.mul, operator.imul, torch.mul, "mul", "mul_", fixed=True)
def _multiply(call: Call) -> Step | None:
    if len(call.sources) != 1 or call.kwargs or len(call.args) != 2:
        return None
    constant = call.args[1] if isinstance(call.args[0], fx.Node) else call.args[0]
    factor = _scaling(constant, 1, call)

    def interval(a: Any, b: Any) -> Interval:
        x, by = (a, b) if isinstance(a, Interval) else (b, a)
        return arithmetic.scale(x, constant_sample(call, by))

    apply = with_constants(operator.mul, call.args)
    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=aligned(call, interval))


@builds(operator.truediv, operator.itruediv, torch.div, "div", "div_", fixed=True)
def _divide(call: Call) -> Step | None:
    if not call.on_one or call.kwargs:
        return None
    factor = _scaling(call.args[1], -1, call)

    def interval(x: Interval, by: Any) -> Interval:
        divisor = torch.as_tensor(constant_sample(call, by), dtype=torch.float64, device=x.lower.device)
        return arithmetic.scale(x, 1.0 / divisor, EPS)

    apply = with_constants(operator.truediv, call.args)
    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=aligned(call, interval))


def _scaling(constant: Any, power: int, call: Call) -> Factor:
    """Factor of a multiplication (power 1) or division (-1) by a number or tensor that does not depend on the input."""
    shape = call.shape
    if isinstance(constant, fx.Node):
        raise missing_rule("a product of a traced tensor with itself", call.where)
    try:
        value = torch.as_tensor(constant, dtype=torch.float64) ** power
    except (RuntimeError, TypeError, ValueError):
        raise missing_rule(f"a factor that is {type(constant).__name__}", call.where) from None
    if not torch.isfinite(value).all():
        raise missing_rule("a factor that is not finite", call.where)
    if shape != call.sources[0].shape:
        return largest_slice(constant_sample(call, value).abs(), call.sources[0].shape, shape)
    channels = shape[0]
    # [C, 1, ..., 1] or [1, C, 1, ..., 1], the usual shapes of means and standard deviations.
    if (
        call.alone
        and value.numel() == channels > 1
        and value.dim() >= len(shape)
        and value.shape[-len(shape)] == channels
    ):
        return Diagonal(value.flatten().cpu())
    return value.abs().max().item() * (1.0 + 1e-15)
