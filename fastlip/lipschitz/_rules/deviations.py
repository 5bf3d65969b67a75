"""Standard deviations and variances over some axes, alone or with the mean."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rowwise import on_samples
from fastlip.lipschitz._steps import Step, first_sample, in_graph

#: Rounding of a few operations on numbers.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Variance(Weighted):
    """A variance, the square of a deviation s that moves by at most ``deviation`` times its input: 2 s deviation.

    Attributes:
        largest: the largest deviation between bounds of the input.
        deviation: the constant of the deviation.
    """

    name: ClassVar[str] = "variance"
    largest: Callable[[Interval], float]
    deviation: float

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        return [2.0 * self.largest(magnitudes[0]) * self.deviation * (1.0 + _ROUNDING)]


@dataclass(frozen=True)
class _Group:
    """The elements of each variance: the axes in the graph, their number n, and what is divided by, n - correction."""

    axes: tuple[int, ...]
    keep: bool
    n: int
    divisor: float

    def ends(self, x: Interval, source: Step, batch: int) -> Interval:
        """Bounds of the deviations, for each domain the tensor of the graph, [B, ...]."""
        low, high = (torch.stack([in_graph(row[None], source, batch) for row in end]) for end in (x.lower, x.upper))
        axes = [axis % (low.dim() - 1) + 1 for axis in self.axes]
        slack = 1.01 * (self.n + 8) * arithmetic.EPS
        # Popoviciu: no more than half of the range. And no more than the norm over sqrt(n).
        half = 0.5 * (high.amax(axes, keepdim=True) - low.amin(axes, keepdim=True))
        size = torch.maximum(-low, high)
        scale = size.amax(axes, keepdim=True).clamp(1e-300, 1e300)
        root = (size / scale).square().mean(axes, keepdim=True).sqrt() * scale
        upper = torch.minimum(half, root) * math.sqrt(self.n / self.divisor) * (1.0 + slack) + arithmetic.TINY
        upper = upper if self.keep else upper.squeeze(axes)
        return Interval(torch.zeros_like(upper), upper)


@builds(torch.std, torch.var, "std", "var")
def _deviation(call: Call) -> Step | None:
    group = _group(call)
    return None if group is None else _step(call, group, "var" in call.name, call.shape, call.alone)


@builds(torch.std_mean, torch.var_mean)
def _with_mean(call: Call) -> tuple[Step, Step] | None:
    group = _group(call)
    if group is None:
        return None
    described = call.values.bundles[call.node][0]
    (shape, _), alone = call.part_shapes, call.values.alone(described.shape)
    assert shape is not None

    def mean(x: Tensor) -> Tensor:
        return x.mean(group.axes, group.keep)

    means = on_samples(mean, call.sources[0], alone, call.values.batch)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        return arithmetic.monotone_linear(means, x, group.n)

    factor = group.n**-0.5 * (1.0 + 1e-15)
    second = Step(
        call.where, call.name, call.sources, factor, shape, apply=lambda x, *_, **__: mean(x), interval=interval
    )
    return _step(call, group, "var" in call.name, shape, alone), second


def _step(call: Call, group: _Group, square: bool, shape: tuple[int, ...], alone: bool) -> Step:
    source, batch = call.sources[0], call.values.batch
    constant = group.divisor**-0.5 * (1.0 + _ROUNDING)
    name = "var" if square else "std"
    correction = group.n - group.divisor

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        result: Tensor = getattr(x, name)(group.axes, correction=correction, keepdim=group.keep)
        return result

    def largest(x: Interval) -> float:
        return group.ends(x, source, batch).upper.max().item()

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        upper = torch.cat([first_sample(row, alone) for row in group.ends(x, source, batch).upper])
        if square:
            upper = upper.square() * (1.0 + _ROUNDING) + arithmetic.TINY
        return Interval(torch.zeros_like(upper), upper)

    factor = Variance(largest, constant) if square else constant
    return Step(call.where, call.name, call.sources, factor, shape, apply=apply, interval=interval)


def _group(call: Call) -> _Group | None:
    """The groups of elements that a call reduces, or None if that is not known or takes the batch's axis.

    Torch has two signatures: (input, dim, unbiased, keepdim), where dim may be left out, and with ``correction``.
    """
    rest = list(call.args[1:])
    given = dict(call.kwargs)
    if rest and not isinstance(rest[0], bool):
        given["dim"] = rest.pop(0)
    given |= dict(zip(("unbiased", "keepdim"), rest, strict=False))
    if not call.on_one or any(isinstance(value, fx.Node) for value in given.values()) or given.get("out") is not None:
        return None
    node = next(n for n in call.node.all_input_nodes if n in call.steps)
    shape = call.values.shapes[node]
    dims = given.get("dim")
    axes = tuple(range(len(shape))) if dims in (None, (), []) else (dims,) if isinstance(dims, int) else tuple(dims)
    axes = tuple(sorted(axis % len(shape) - len(shape) for axis in axes))
    if call.sources[0].alone and -len(shape) in axes:
        raise missing_rule(f"{call.name} over the batch's axis", call.where)
    n = math.prod(shape[axis] for axis in axes)
    correction = given.get("correction", given.get("unbiased", True))
    divisor = n - (1.0 if correction is None else float(correction))
    if not divisor > 0.0:
        raise ValueError(f"{call.where}: {call.name} of {n} values has no Lipschitz constant")
    return _Group(axes, bool(given.get("keepdim", False)), n, divisor)
