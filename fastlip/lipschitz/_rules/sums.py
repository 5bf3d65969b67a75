"""Sums, differences and concatenations."""

import operator

import torch
from torch import fx

from fastlip.lipschitz._calls import Call, with_constants
from fastlip.lipschitz._combinations import Combination, Concatenation, Difference, Sum
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._steps import Step

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACT = (operator.sub, operator.isub, torch.sub, "sub", "sub_")


@builds(*_ADD, *_SUBTRACT, fixed=True)
def _sum(call: Call) -> Step:
    operands = [a for a in call.args if isinstance(a, fx.Node)]
    if call.kwargs or len(call.args) != 2 or any(call.sample_shape(a) != call.shape for a in operands):
        raise missing_rule(f"{call.name} with broadcasting or alpha", call.where)
    # x + x counts x twice; adding a constant changes no distance.
    inputs = [call.steps[a] for a in operands]
    several: Combination
    several, by = (Sum(), operator.add) if call.target in _ADD else (Difference(), operator.sub)
    factor = several if len(inputs) > 1 else 1.0
    same = len(inputs) == 1 and call.target in _ADD
    return Step(call.where, call.name, inputs, factor, call.shape, apply=with_constants(by, call.args), same=same)


@builds(torch.cat, torch.concat, torch.concatenate, fixed=True)
def _concatenation(call: Call) -> Step:
    tensors = call.args[0] if call.args else call.kwargs["tensors"]
    inputs = [call.steps[a] for a in tensors if isinstance(a, fx.Node)]
    return Step(call.where, call.name, inputs, Concatenation(), call.shape, apply=torch.cat)
