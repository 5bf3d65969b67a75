"""Linear functions along an axis, of constants' shapes, or with a constant choice: cumsum, diff, where and others."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import largest_slice
from fastlip.lipschitz._calls import Call, as_function, with_constants
from fastlip.lipschitz._combinations import BroadcastSum, Combination, Concatenation
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import Factor, builds, missing_rule
from fastlip.lipschitz._rowwise import by_ends, constant_sample
from fastlip.lipschitz._steps import Step, first_sample


@builds(torch.cumsum, "cumsum")
def _cumulative_sum(call: Call) -> Step | None:
    """A triangular matrix of ones, whose inverse has the tridiagonal Gram matrix of a difference: a sine."""
    axis = _axis(call)
    if axis is None:
        return None
    n = call.sources[0].shape[axis]

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.cumsum(axis)

    means = by_ends(call, lambda x, *_, **__: apply(x) / max(n, 1), terms=max(n, 2))
    factor = 0.5 / math.sin(math.pi / (4 * n + 2)) * (1.0 + 8.0 * EPS) if n else 0.0
    step = Step(
        *(call.where, call.name, call.sources, factor, call.shape),
        apply=apply,
        interval=lambda *args, **kwargs: arithmetic.scale(means(*args, **kwargs), float(n)),
        linear=True,
    )
    return step


@builds(torch.diff, "diff")
def _difference(call: Call) -> Step | None:
    """Neighbours' differences: a matrix whose Gram matrix is tridiagonal, with cosines as singular values."""
    given = dict(zip(("input", "n", "dim"), call.args, strict=False)) | call.kwargs
    if not call.on_one or given.get("n", 1) != 1 or set(given) - {"input", "n", "dim"}:
        return None
    axis = _checked_axis(call, given.get("dim", -1))
    n = call.sources[0].shape[axis]
    factor = 2.0 * math.cos(0.5 * math.pi / n) * (1.0 + 8.0 * EPS) if n > 1 else 0.0

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.diff(dim=axis)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        ends = ((end.narrow(axis, 1, n - 1), end.narrow(axis, 0, n - 1)) for end in (x.lower, x.upper))
        (later_low, low), (later_high, high) = ends
        return arithmetic.subtract(Interval(later_low, later_high), Interval(low, high))

    return Step(
        call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval, linear=True
    )  # fmt: skip


@builds(torch.where, "where")
def _chosen(call: Call) -> Step | None:
    """The elements of one or the other of two tensors, where that does not depend on the input."""
    condition, *both = (call.args[1], call.args[0], *call.args[2:]) if call.target == "where" else call.args
    if len(both) != 2 or call.kwargs or not isinstance(condition, Tensor):
        return None
    chosen = constant_sample(call, condition).bool()
    nodes = [(a, of) for a, of in zip(both, (chosen, ~chosen), strict=True) if isinstance(a, fx.Node)]
    times = tuple(largest_slice(of.double(), call.sample_shape(a), call.shape) for a, of in nodes)
    apply = with_constants(as_function(call.target), call.args)
    factor: Factor | Combination
    if len(nodes) == 1:
        factor = times[0]
    elif any(call.sample_shape(a) != call.shape for a, _ in nodes):
        factor = BroadcastSum(times)
    else:  # an element comes from one of both
        factor = Concatenation()
    inputs = [call.steps[node] for node, _ in nodes]
    return Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=by_ends(call, apply))


@builds(F.grid_sample)
def _sampled(call: Call) -> Step | None:
    """Averages of neighbouring pixels at places that do not depend on the input.

    The norm of a matrix without negative entries is at most the root of its largest sum of a row and of a column.
    """
    names = ("input", "grid", "mode", "padding_mode", "align_corners")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    grid, mode = given.get("grid"), given.get("mode", "bilinear")
    if not call.on_one or not isinstance(grid, Tensor) or not call.sources[0].alone:
        return None
    if mode not in ("bilinear", "nearest"):
        raise missing_rule(f"{call.name} with mode {mode!r}", call.where)
    if not bool(torch.isfinite(grid).all()):
        raise ValueError(f"{call.where}: {call.name} at places that are not finite")
    held, settings = grid.detach().clone(), (mode, given.get("padding_mode", "zeros"), given.get("align_corners"))

    def apply(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now: Tensor = args[0] if args else kwargs["grid"]
        return F.grid_sample(x, (held if now.shape == held.shape else now).to(x), *settings)

    factor = 0.0
    for dtype in {call.source_dtype, torch.float64}:  # a place is rounded to one pixel or its neighbour
        with torch.inference_mode(False), torch.enable_grad():
            ones = torch.ones(len(held), 1, *call.sources[0].shape[1:], dtype=dtype, device=held.device)
            sums = apply(ones.requires_grad_(), held.clone())
            (columns,) = torch.autograd.grad(sums.sum(), ones)
        most = sums.amax().item() * columns.amax().item() if sums.numel() else 0.0
        factor = max(factor, math.sqrt(most) * (1.0 + 100.0 * torch.finfo(dtype).eps))
    interval = by_ends(call, apply, terms=2 ** (grid.dim() - 2))
    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval, linear=True)


@builds(torch.rsub)
def _subtracted_from(call: Call) -> Step | None:
    """A constant minus the input."""
    if not call.on_one or len(call.args) != 2 or call.kwargs or isinstance(call.args[1], fx.Node):
        return None
    constant = call.args[1]
    if isinstance(constant, Tensor) and constant.dim():
        return None

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.rsub(x, constant)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        return arithmetic.shift(arithmetic.negative(x), torch.as_tensor(constant, dtype=torch.float64))

    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=apply, interval=interval)


@builds(torch.zeros_like, torch.ones_like, torch.full_like)
def _filled(call: Call) -> Step | None:
    """A constant, of which the input only says the shape."""
    if not call.on_one or any(isinstance(a, fx.Node) for a in (*call.args[1:], *call.kwargs.values())):
        return None
    function = as_function(call.target)

    def apply(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        filled: Tensor = function(x, *args, **kwargs)
        return filled

    def interval(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        graph = torch.zeros(call.values.shapes[call.node], dtype=torch.float64, device=x.lower.device)
        sample = first_sample(apply(graph, *args, **{**kwargs, "dtype": torch.float64}), call.alone)
        sample = sample.expand(x.batch, *sample.shape[1:])
        return Interval(sample, sample)

    return Step(call.where, call.name, call.sources, 0.0, call.shape, apply=apply, interval=interval)


def _axis(call: Call) -> int | None:
    """The axis of a call whose only other argument it is, counted from the end; None of other calls."""
    given = dict(zip(("input", "dim"), call.args, strict=False)) | call.kwargs
    if not call.on_one or len(call.args) > 2 or set(given) != {"input", "dim"} or not isinstance(given["dim"], int):
        return None
    if call.values.dtypes[call.node] != call.source_dtype:
        raise missing_rule(f"{call.name} to another dtype", call.where)
    return _checked_axis(call, given["dim"])


def _checked_axis(call: Call, dim: int) -> int:
    """An axis counted from the end.

    Raises:
        MissingRule: it is the batch's.
    """
    axis = dim % call.rank - call.rank
    if axis == -call.rank and call.sources[0].alone:
        raise missing_rule(f"{call.name} along the batch's axis", call.where)
    return axis
