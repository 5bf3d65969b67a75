"""Functions that apply a weight, as layers do."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rowwise import by_entries
from fastlip.lipschitz._steps import Step
from fastlip.norms import module_operator
from fastlip.norms._models.layer_output import apply_operator


@builds(F.linear)
def _linear(call: Call) -> Step | None:
    given = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if not call.on_one or not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        raise missing_rule(f"{call.name} with a weight that depends on the input", call.where)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    operator = module_operator(layer, call.sources[0].entry_shape)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return apply_operator(operator, x, layer.bias)

    def interval(x: Interval) -> Interval:
        return arithmetic.through_operator(operator, x, layer.bias)

    bounds = by_entries(call, interval)
    return Step(call.where, call.name, call.sources, operator, call.shape, layer, apply=apply, interval=bounds)
