"""Elementwise functions: those with one constant, those whose slope depends on their argument, and choices of two."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import copies, largest_element
from fastlip.lipschitz._calls import Call, as_function
from fastlip.lipschitz._combinations import Combination, Weighted
from fastlip.lipschitz._intervals import EPS, INF, Interval
from fastlip.lipschitz._log_arithmetic import add, half, log10, multiply
from fastlip.lipschitz._registry import builds
from fastlip.lipschitz._rowwise import aligned, constant_sample
from fastlip.lipschitz._steps import Step


@dataclass(frozen=True)
class Slope(Weighted):
    """An elementwise function, whose constant is its largest slope between the bounds of its argument.

    Attributes:
        largest: upper bounds on the magnitude of the slope, elementwise, from the ends of the argument; inf where there
            is none.
    """

    name: ClassVar[str] = "slope"
    largest: Callable[[Tensor, Tensor], Tensor]

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        (x,) = magnitudes
        slope = self.largest(x.lower, x.upper)
        return [largest_element(torch.where(slope.isnan(), INF, slope)) * (1.0 + 64.0 * EPS)]


def _rising(function: Callable[[Tensor], Tensor], **limits: Any) -> Callable[..., Interval]:
    """Bounds of an increasing function's values."""

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        return arithmetic.through_function(x, function, **limits)

    return interval


def _positive(slope: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The slope at the lower end of arguments > 0, where it is largest; none elsewhere."""
    return lambda lower, upper: torch.where(lower > 0.0, slope(lower.clamp_min(1e-300)), INF)


def _on_positive(function: Callable[[Tensor], Tensor], *, falls: bool = False) -> Callable[..., Interval]:
    """Bounds of a monotone function of positive arguments; unbounded where the argument may be 0 or less."""

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        safe = x.lower > 0.0
        inside = Interval(torch.where(safe, x.lower, 1.0), torch.where(safe, x.upper, 1.0))
        if falls:
            inside = arithmetic.negative(inside)
            y = arithmetic.through_function(inside, lambda t: function(-t))
        else:
            y = arithmetic.through_function(inside, function)
        return Interval(torch.where(safe, y.lower, -INF), torch.where(safe, y.upper, INF))

    return interval


def _within_one(x: Interval, *_: Any, **__: Any) -> Interval:
    ones = torch.ones_like(x.lower)
    return Interval(-ones, ones)


def _magnitude(x: Interval, *_: Any, **__: Any) -> Interval:
    crosses = (x.lower < 0.0) & (x.upper > 0.0)
    least = torch.where(crosses, 0.0, torch.minimum(x.lower.abs(), x.upper.abs()))
    return Interval(least, x.magnitude(), x.norm)


def _negative(x: Interval, *_: Any, **__: Any) -> Interval:
    return arithmetic.negative(x)


_Interval = Callable[..., Interval]

#: Functions with one constant, and the bounds of their values.
_BY_CONSTANT: dict[str, tuple[float, _Interval]] = {
    "abs": (1.0, _magnitude),
    "absolute": (1.0, _magnitude),
    "neg": (1.0, _negative),
    "negative": (1.0, _negative),
    "sin": (1.0, _within_one),
    "cos": (1.0, _within_one),
    # 2 / sqrt(pi), at 0.
    "erf": (1.12838, _rising(torch.erf, limits=(-1.0, 1.0))),
    "atan": (1.0, _rising(torch.atan)),
    "asinh": (1.0, _rising(torch.asinh)),
}

#: Functions whose slope depends on their argument, and the bounds of their values.
_BY_SLOPE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], _Interval]] = {
    "exp": (lambda lower, upper: upper.exp(), _rising(torch.exp, limits=(0.0, INF))),
    "expm1": (lambda lower, upper: upper.exp(), _rising(torch.expm1)),
    "square": (lambda lower, upper: 2.0 * torch.maximum(-lower, upper), lambda x: _power(x, 2)),
    "log": (_positive(lambda t: 1.0 / t), _on_positive(torch.log)),
    "log1p": (lambda lower, upper: _positive(lambda t: 1.0 / t)(1.0 + lower, upper), lambda x: _log1p(x)),
    "sqrt": (_positive(lambda t: 0.5 / t.sqrt()), _on_positive(torch.sqrt)),
    "rsqrt": (_positive(lambda t: 0.5 * t**-1.5), _on_positive(torch.rsqrt, falls=True)),
    "reciprocal": (
        lambda lower, upper: torch.where(
            (lower > 0.0) | (upper < 0.0), torch.maximum(lower.square().reciprocal(), upper.square().reciprocal()), INF
        ),
        lambda x: arithmetic.divide(Interval(torch.ones_like(x.lower), torch.ones_like(x.lower)), x),
    ),
}


def _log1p(x: Interval) -> Interval:
    return _on_positive(torch.log)(arithmetic.shift(x, 1.0))


def _power(x: Interval, exponent: int) -> Interval:
    """Bounds of a whole power, at least 1."""
    if exponent % 2:
        return arithmetic.through_function(x, lambda t: t**exponent)
    return arithmetic.through_function(_magnitude(x), lambda t: t**exponent, limits=(0.0, INF))


def _targets(name: str) -> list[Any]:
    """The function of torch and the methods of a name, also those in place."""
    return [getattr(torch, name), *([operator.neg] if name == "neg" else []), name, f"{name}_"]


@builds(*(target for name in _BY_CONSTANT for target in _targets(name)), operator.abs)
def _constant(call: Call) -> Step | None:
    if not call.on_one or len(call.args) != 1 or call.kwargs:
        return None
    factor, interval = _BY_CONSTANT[call.name.removesuffix("_")]
    apply = as_function(call.name.removesuffix("_"))
    step = Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval)
    step.linear = interval is _negative
    return step


@builds(*(target for name in _BY_SLOPE for target in _targets(name)))
def _slope(call: Call) -> Step | None:
    if not call.on_one or len(call.args) != 1 or call.kwargs:
        return None
    largest, interval = _BY_SLOPE[call.name.removesuffix("_")]
    apply = as_function(call.name.removesuffix("_"))
    return Step(call.where, call.name, call.sources, Slope(largest), call.shape, apply=apply, interval=interval)


@builds(torch.pow, operator.pow, "pow", "pow_", "__pow__")
def _whole_power(call: Call) -> Step | None:
    exponent = call.args[1] if call.on_one and len(call.args) == 2 and not call.kwargs else None
    if not isinstance(exponent, (int, float)) or exponent != int(exponent) or exponent < 1:
        return None
    k = int(exponent)

    def largest(lower: Tensor, upper: Tensor) -> Tensor:
        return k * torch.maximum(-lower, upper) ** (k - 1)

    return Step(
        call.where,
        call.name,
        call.sources,
        Slope(largest),
        call.shape,
        apply=lambda x, *_: x**k,
        interval=lambda x, *_: _power(x, k),
    )


@builds(torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clamp_min", "clamp_max", torch.clamp_min, torch.clamp_max)
def _clamp(call: Call) -> Step | None:
    names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(call.name, ("min", "max"))
    ends = dict(zip(names, call.args[1:], strict=False)) | call.kwargs
    if not call.on_one or call.shape != call.sources[0].shape or any(isinstance(e, fx.Node) for e in ends.values()):
        return None
    low, high = ends.get("min"), ends.get("max")
    if any(isinstance(end, Tensor) and end.numel() > 1 for end in (low, high)):
        return None
    least, most = (None if end is None else float(end) for end in (low, high))
    if (least is None and most is None) or any(end is not None and math.isnan(end) for end in (least, most)):
        return None

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        return Interval(torch.clamp(x.lower, least, most), torch.clamp(x.upper, least, most))

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.clamp(x, least, most)

    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=apply, interval=interval)


@dataclass(frozen=True)
class Choice(Combination):
    """Each element is that of one of the inputs: no element changes more than the inputs' elements together.

    Attributes:
        repeated: norm of the map that broadcasts each input.
    """

    name: ClassVar[str] = "choice"
    repeated: tuple[float, ...]

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Interval]) -> float:
        terms = [multiply(log, log10(times)) for log, times in zip(logs, self.repeated, strict=True)]
        return half(add(multiply(term, term) for term in terms))


@builds(torch.maximum, torch.minimum, torch.max, torch.min, "maximum", "minimum", "max", "min")
def _choice(call: Call) -> Step | None:
    if len(call.args) != 2 or call.kwargs or not call.values.shapes.get(call.node):
        return None
    nodes = [a for a in call.args if isinstance(a, fx.Node) and a in call.steps]
    if len(nodes) != len([a for a in call.args if not isinstance(a, Tensor)]) or not nodes:
        return None
    largest = "max" in call.name
    by = torch.maximum if largest else torch.minimum

    def interval(*args: Any) -> Interval:
        ends = [
            by(*(getattr(a, name) if isinstance(a, Interval) else constant_sample(call, a).double() for a in args))
            for name in ("lower", "upper")
        ]
        return Interval(*ends)

    inputs = [call.steps[node] for node in nodes]
    repeated = tuple(copies(call.sample_shape(node), call.shape) for node in nodes)
    # With one traced tensor the other is constant.
    factor = Choice(repeated) if len(nodes) == 2 else repeated[0]
    return Step(call.where, call.name, inputs, factor, call.shape, apply=by, interval=aligned(call, interval))
