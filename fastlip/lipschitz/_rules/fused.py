"""torch.addcmul, which multiplies by a constant and adds one."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import largest_slice
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds
from fastlip.lipschitz._rowwise import aligned, constant_sample
from fastlip.lipschitz._steps import Step


@builds(torch.addcmul, "addcmul", "addcmul_")
def _scaled_and_shifted(call: Call) -> Step | None:
    """An offset plus value * weight * x, elementwise with broadcasting, of which x alone depends on the input."""
    given = dict(zip(("input", "tensor1", "tensor2"), call.args, strict=False)) | call.kwargs
    value = given.pop("value", 1)
    if len(call.args) != 3 or set(given) != {"input", "tensor1", "tensor2"} or not isinstance(value, (int, float)):
        return None
    traced = [at for at, a in enumerate(call.args) if isinstance(a, fx.Node)]
    if len(traced) != 1 or traced[0] == 0 or not all(isinstance(a, (Tensor, fx.Node)) for a in call.args):
        return None
    at = traced[0]
    offset, weight = call.args[0].detach().clone(), call.args[3 - at].detach().clone() * float(value)
    sample = constant_sample(call, weight)
    source = call.sources[0]
    factor = largest_slice(sample.double().abs().cpu(), source.shape, call.shape)
    if not math.isfinite(factor):
        raise ValueError(f"{call.where}: {call.name} with a constant that is not finite")

    def apply(*args: Tensor, **_: Any) -> Tensor:
        x = args[at]
        return torch.addcmul(offset.to(x), weight.to(x), x)

    def interval(*args: Any, **_: Any) -> Interval:
        y = arithmetic.scale(args[at], sample, 1e-15)
        return arithmetic.shift(y, constant_sample(call, offset))

    return Step(call.where, call.name, [source], factor, call.shape, apply=apply, interval=aligned(call, interval))
