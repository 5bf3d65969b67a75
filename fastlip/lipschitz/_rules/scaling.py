"""Multiplication and division of a traced tensor by what does not depend on the input."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import largest_slice
from fastlip.lipschitz._calls import Call, with_constants
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import Diagonal, Factor, builds, missing_rule
from fastlip.lipschitz._rowwise import aligned, constant_sample
from fastlip.lipschitz._steps import Step


@builds(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", fixed=True)
def _multiply(call: Call) -> Step | None:
    if len(call.sources) != 1 or call.kwargs or len(call.args) != 2:
        return None
    constant = call.args[1] if isinstance(call.args[0], fx.Node) else call.args[0]
    return _scaled(call, constant, 1)


@builds(operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_", "divide", fixed=True)
def _divide(call: Call) -> Step | None:
    if not call.on_one or call.kwargs or len(call.args) != 2:
        return None
    return _scaled(call, call.args[1], -1)


def _scaled(call: Call, constant: Any, power: int) -> Step:
    """The step of a product (power 1) with, or a quotient (-1) by, a number or tensor that is constant."""
    if isinstance(constant, fx.Node):
        raise missing_rule("a product of a traced tensor with itself", call.where)
    try:
        value = torch.as_tensor(constant, dtype=torch.float64).detach() ** power
    except (RuntimeError, TypeError, ValueError):
        raise missing_rule(f"a factor that is {type(constant).__name__}", call.where) from None
    if not torch.isfinite(value).all():
        raise missing_rule("a factor that is not finite", call.where)

    def interval(a: Any, b: Any) -> Interval:
        x = a if isinstance(a, Interval) else b
        return arithmetic.scale(x, constant_sample(call, value), 4.0 * EPS)

    apply = with_constants(operator.mul if power == 1 else operator.truediv, call.args)
    factor = _factor(value, call)
    step = Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=aligned(call, interval))
    step.linear = not isinstance(factor, Diagonal)
    return step


def _factor(value: Tensor, call: Call) -> Factor:
    """Factor of a multiplication by a tensor that broadcasts to the output, or to which the input is broadcast."""
    source = next(call.values.shapes[n] for n in call.node.all_input_nodes if n in call.steps)
    output = call.values.shapes[call.node]
    if output != source:
        return largest_slice(value.abs(), source, output)
    shape, channels = call.shape, call.shape[0] if call.shape else 0
    # [C, 1, ..., 1] or [1, C, 1, ..., 1], the usual shapes of means and standard deviations.
    if (
        call.alone
        and value.numel() == channels > 1
        and value.dim() >= len(shape)
        and value.shape[-len(shape)] == channels
    ):
        return Diagonal(value.flatten().cpu())
    return value.abs().max().item() * (1.0 + 1e-15) if value.numel() else 0.0
