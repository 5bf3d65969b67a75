"""The factors that rules return, checked."""

import math

import torch
from torch import nn

from fastlip.lipschitz._registry import Diagonal, Factor, FunctionCall, Rule, find_rule, missing_rule
from fastlip.lipschitz._rules.activations import require_continuous
from fastlip.norms import NormInterval, Operator


def module_factor(
    module: nn.Module, name: str, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Factor:
    """The factor that a module's rule gives it on inputs of one shape and dtype; errors name the module."""
    found = find_rule(module)
    if found is None:
        raise missing_rule(type(module).__name__, name)
    try:
        require_continuous(module, dtype)
        factor = found(module, input_shape)
    except ValueError as error:
        raise ValueError(f"module {name}: {error}") from None
    if not isinstance(factor, (int, float, NormInterval, Operator, Diagonal)):
        raise ValueError(
            f"the rule of {type(module).__name__} (at {name}) returned {type(factor).__name__}, not a float, "
            "NormInterval, Operator or Diagonal"
        )
    if isinstance(factor, (int, float)) and not 0.0 <= factor < math.inf:
        raise ValueError(f"the rule of {type(module).__name__} (at {name}) returned {factor}, not a finite bound >= 0")
    return factor


def function_factor(
    rule: Rule, call: FunctionCall, name: str, where: str, input_shape: tuple[int, ...]
) -> float | NormInterval:
    """The factor that a function's rule gives a call of it; errors name the function."""
    try:
        factor = rule(call, input_shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if isinstance(factor, NormInterval):
        return factor
    if not isinstance(factor, (int, float)) or not 0.0 <= factor < math.inf:
        raise ValueError(f"the rule of {name} (at {where}) returned {factor}, not a finite bound >= 0 or NormInterval")
    return factor
