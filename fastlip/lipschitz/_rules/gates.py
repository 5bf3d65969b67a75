"""Gated linear units (Dauphin, Fan, Auli and Grangier 2017): y = a s(b), where a and b are the halves of the input.

An element of y depends on one of a and one of b, and no two depend on the same, so that the norm of the Jacobian is the
largest of sqrt(s(b)^2 + (a s'(b))^2), s being the logistic function and s' = s (1 - s), at most 1/4.
"""

import torch
from torch import nn

from fastlip.lipschitz._interval_arithmetic import multiply
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Ranged, rule

#: Rounding of a few operations on numbers, and of the logistic function.
_ROUNDING = 1e-14


@rule(nn.GLU)
def _gated(module: nn.Module, input_shape: tuple[int, ...]) -> Ranged:
    assert isinstance(module, nn.GLU)
    axis = module.dim if module.dim < 0 else module.dim - len(input_shape) - 1
    if not -len(input_shape) <= axis:
        raise ValueError(f"GLU over axis {module.dim} mixes the batch")

    def halves(x: Interval) -> tuple[Interval, Interval]:
        (a, b), (c, d) = (end.chunk(2, axis) for end in (x.lower, x.upper))
        return Interval(a, c), Interval(b, d)

    def constant(x: Interval) -> float:
        a, b = halves(x)
        if not a.lower.numel():
            return 0.0
        nearest = torch.maximum(b.lower, -b.upper).clamp_min(0.0)  # the least |b|, where s' is largest
        slope = torch.sigmoid(nearest) * torch.sigmoid(-nearest) * (1.0 + _ROUNDING)
        largest = torch.hypot(torch.sigmoid(b.upper), (a.magnitude() * slope).nan_to_num(nan=torch.inf))
        return largest.max().item() * (1.0 + _ROUNDING)

    def values(x: Interval) -> Interval:
        a, b = halves(x)
        low, high = (torch.sigmoid(end) for end in (b.lower, b.upper))
        return multiply(a, Interval(low * (1.0 - _ROUNDING), (high * (1.0 + _ROUNDING)).clamp_max(1.0)))

    return Ranged(constant, values)
