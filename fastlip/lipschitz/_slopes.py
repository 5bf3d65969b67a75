"""Bounds of an activation's slope where its argument lies in an interval."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.norms._operators.modules import keeps_forward

#: Bound on the error of a slope that autograd computes in float64, and how near a point of least or largest slope an
#: interval counts as reaching it.
_ERROR, _NEAR = 1e-12, 1e-2


def slope_bounds(module: nn.Module, x: Interval) -> tuple[Tensor, Tensor] | None:
    """Least and largest slope of an activation on an interval, elementwise, or None if it is not known.

    At a kink that the interval touches, the slopes of both sides count.
    """
    known = (nn.PReLU, *_PIECEWISE, *_SMOOTH)
    cls = next((cls for cls in type(module).__mro__ if cls in known), None)
    if cls is None or not keeps_forward(module, cls):  # a subclass with a rule of its own may do something else
        return None
    if cls is nn.PReLU:
        assert isinstance(module, nn.PReLU)
        weight = module.weight.detach().double()
        by_channel = weight.view(-1, *(1,) * (len(x.shape) - 1)) if weight.numel() > 1 else weight
        return _piecewise(*_leaky(by_channel), x)
    if cls in _SMOOTH:
        return _smooth(module, _SMOOTH[cls](module), x)
    low, high = _piecewise(*_PIECEWISE[cls](module), x)
    # A sixth is not a number of float64.
    return (low - EPS, high + EPS) if cls is nn.Hardsigmoid else (low, high)


def slope_range(module: nn.Module | None) -> tuple[float, float] | None:
    """Least and largest slope of an elementwise activation anywhere, or None if they are not known.

    Only of torch's own classes: a subclass with a rule of its own may do something else.
    """
    if module is None or type(module) not in {*_PIECEWISE, *_SMOOTH, nn.PReLU}:
        return None
    found = slope_bounds(module, Interval.unbounded((1,)))
    assert found is not None
    low, high = found[0].min().item(), found[1].max().item()
    grows = type(module) in _GROWING or (type(module) is nn.ELU and module.alpha >= 0.0)
    return (max(low, 0.0) if grows else low), high


def _piecewise(breaks: Sequence[float], slopes: Sequence[float | Tensor], x: Interval) -> tuple[Tensor, Tensor]:
    """Of a piecewise linear function with one more slope than breaks."""
    low, high = torch.full_like(x.lower, torch.inf), torch.full_like(x.lower, -torch.inf)
    for i, slope in enumerate(slopes):
        side = torch.as_tensor(slope, dtype=torch.float64).to(low.device)
        begin = breaks[i - 1] if i else -torch.inf
        end = breaks[i] if i < len(breaks) else torch.inf
        touches = (x.upper >= begin) & (x.lower <= end)
        low = torch.where(touches, torch.minimum(low, side), low)
        high = torch.where(touches, torch.maximum(high, side), high)
    return low, high


@dataclass(frozen=True)
class _Turn:
    """A point where the slope is least or largest, or jumps, and a slope there, rounded outwards."""

    at: float
    slope: float


def _smooth(module: nn.Module, turns: Sequence[_Turn], x: Interval) -> tuple[Tensor, Tensor]:
    """Of a function whose slope is monotone between its turns."""
    ends = [_slope(module, end) for end in (x.lower, x.upper)]
    low, high = torch.minimum(*ends) - _ERROR, torch.maximum(*ends) + _ERROR
    for turn in turns:
        reached = (x.lower <= turn.at + _NEAR) & (x.upper >= turn.at - _NEAR)
        low = torch.where(reached, low.clamp_max(turn.slope), low)
        high = torch.where(reached, high.clamp_min(turn.slope), high)
    return low, high


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    module = copy.copy(module)
    vars(module)["inplace"] = False  # torch has no gradients in place where slopes are negative
    # Beyond this the slopes are those at infinity, and computing them could overflow.
    with torch.enable_grad():
        x = x.detach().clamp(-1e100, 1e100).requires_grad_()
        (slope,) = torch.autograd.grad(type(module).forward(module, x.clone()).sum(), x)
    return slope


def _leaky(slope: float | Tensor) -> tuple[list[float], list[float | Tensor]]:
    return [0.0], [slope, 1.0]


_PIECEWISE: dict[type[nn.Module], Callable[[Any], tuple[list[float], list[Any]]]] = {
    nn.ReLU: lambda m: _leaky(0.0),
    nn.LeakyReLU: lambda m: _leaky(float(m.negative_slope)),
    nn.RReLU: lambda m: _leaky(0.5 * (float(m.lower) + float(m.upper))),
    nn.Threshold: lambda m: ([float(m.threshold)], [0.0, 1.0]),
    nn.ReLU6: lambda m: ([0.0, 6.0], [0.0, 1.0, 0.0]),
    nn.Hardtanh: lambda m: ([float(m.min_val), float(m.max_val)], [0.0, 1.0, 0.0]),
    nn.Hardsigmoid: lambda m: ([-3.0, 3.0], [0.0, 1.0 / 6.0, 0.0]),
    nn.Softshrink: lambda m: ([-float(m.lambd), float(m.lambd)], [1.0, 0.0, 1.0]),
}

#: Smooth functions that never decrease, whatever the error of a computed slope.
_GROWING = (nn.CELU, nn.LogSigmoid, nn.SELU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink)
#: The turns of each slope; a test derives them.
_SMOOTH: dict[type[nn.Module], Callable[[Any], list[_Turn]]] = {
    nn.Sigmoid: lambda m: [_Turn(0.0, 0.25)],
    nn.Tanh: lambda m: [_Turn(0.0, 1.0)],
    nn.Softsign: lambda m: [_Turn(0.0, 1.0)],
    nn.Tanhshrink: lambda m: [_Turn(0.0, 0.0)],
    nn.LogSigmoid: lambda m: [],
    nn.Softplus: lambda m: [],
    nn.ELU: lambda m: [_Turn(0.0, float(m.alpha)), _Turn(0.0, 1.0)],
    nn.CELU: lambda m: [_Turn(0.0, 1.0)],
    nn.SELU: lambda m: [_Turn(0.0, 1.0507), _Turn(0.0, 1.75810)],
    nn.GELU: lambda m: [_Turn(-1.4165, -0.1291), _Turn(1.4165, 1.1291)],
    nn.SiLU: lambda m: [_Turn(-2.3994, -0.09984), _Turn(2.3994, 1.09984)],
    nn.Mish: lambda m: [_Turn(-2.2565, -0.11295), _Turn(1.4906, 1.08850)],
    nn.Hardswish: lambda m: [_Turn(-3.0, -0.5), _Turn(-3.0, 0.0), _Turn(3.0, 1.5), _Turn(3.0, 1.0)],
}
