"""Intervals through functions of the graph, which takes as many samples at once as it was traced with.

The domains of an interval are one after another given to the function, each in place of a sample.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._intervals import EPS, TINY, Interval, as_rows, down, up, upper_norm
from fastlip.lipschitz._steps import Step, first_sample, in_graph


def by_ends(
    call: Call, function: Callable[..., Tensor], *, terms: int = 1, norm: Callable[..., Tensor] | None = None
) -> Callable[..., Interval]:
    """What a function does that rises in each element: applied to all lower and to all upper ends.

    Args:
        call: the call of which it is what the rule says.
        function: of the call's arguments.
        terms: 1 if values are only moved or dropped, or set to constants; otherwise the number of those in the longest
            average that is one element of the output, with coefficients >= 0 that add up to at most 1.
        norm: upper bounds on the norm of the output from those of the inputs, [B] each, if more is known than the
            elements say; their number for an interval that is passed on as it is.
    """

    def interval(*args: Any, **kwargs: Any) -> Interval:
        given = _intervals((args, kwargs))
        rows = max(x.batch for x in given)

        def end(name: str) -> Tensor:
            results = []
            for row in range(rows):
                named = {key: _tensor(call, call.kwargs.get(key), value, name, row) for key, value in kwargs.items()}
                positional = (_tensor(call, a, v, name, row) for a, v in zip(call.args, args, strict=True))
                results.append(first_sample(function(*positional, **named), call.alone))
            return torch.cat(results)

        lower, upper = end("lower"), end("upper")
        if terms > 1:
            magnitudes = [as_rows(x.magnitude()) for x in given]
            largest = torch.stack([t.amax(1).expand(rows) if t.numel() else lower.new_zeros(rows) for t in magnitudes])
            largest = largest.amax(0)
            margin = 1.01 * (terms + 4) * EPS * largest.view(-1, *(1,) * (lower.dim() - 1)) + terms * TINY
            lower, upper = down(lower - margin), up(upper + margin)
        size = None if norm is None else norm(*(x.norm.expand(rows) for x in given))
        if size is not None and terms == 1 and lower.numel() == sum(rows * math.prod(x.shape) for x in given):
            return Interval.as_stored(lower, upper, size)  # the same values elsewhere
        return Interval(lower, upper, size)

    return interval


def on_samples(
    function: Callable[[Tensor], Tensor], source: Step, alone: bool, batch: int
) -> Callable[[Tensor], Tensor]:
    """A function of one tensor of the graph, as one of samples, [D, *shape] to [D, *other shape].

    Args:
        function: the function.
        source: the step whose output it takes.
        alone: whether the batch's axis is alone in front of what it gives.
        batch: the number of samples that the graph takes at once.
    """

    def on(t: Tensor) -> Tensor:
        rows = [function(in_graph(t[i : i + 1], source, batch)) for i in range(len(t))]
        return torch.cat([first_sample(row, alone) for row in rows])

    return on


def fixed_values(call: Call, function: Callable[[Tensor], Tensor]) -> Step:
    """The step of a function of a constant, its first argument, of which the input only says the shape or dtype."""

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return function(x)

    def interval(x: Tensor, *args: Any, **kwargs: Any) -> Interval:
        sample = first_sample(function(x.detach().double()), call.alone)
        return Interval(sample, sample.expand(_intervals((args, kwargs))[0].batch, *sample.shape[1:]))

    return Step(call.where, call.name, call.sources, 0.0, call.shape, apply=apply, interval=interval)


def joint_norm(*norms: Tensor) -> Tensor:
    """The norm of several tensors side by side."""
    return upper_norm(torch.stack(norms, 1))


def aligned(call: Call, function: Callable[..., Interval]) -> Callable[..., Interval]:
    """A function of intervals that broadcast as in the graph: they get as many axes as a sample of the output."""
    rank = len(call.shape)

    def lifted(value: Any) -> Any:
        if not isinstance(value, Interval) or len(value.shape) >= rank:
            return value
        ones = (1,) * (rank - len(value.shape))
        lower, upper = (end.reshape(len(end), *ones, *end.shape[1:]) for end in (value.lower, value.upper))
        return Interval(lower, upper, value.norm)

    def interval(*args: Any, **kwargs: Any) -> Interval:
        # The same interval stays the same, as in x * x.
        once = {id(a): lifted(a) for a in (*args, *kwargs.values())}
        return function(*(once[id(a)] for a in args), **{key: once[id(a)] for key, a in kwargs.items()})

    return interval


def by_entries(call: Call, function: Callable[[Interval], Interval]) -> Callable[..., Interval]:
    """What a module does that takes the first axis for the batch's, whether or not that is the graph's.

    Args:
        call: the call of the module, or of a function that does the same.
        function: of an interval each of whose domains is one of the entries along the first axis.
    """
    alone = call.sources[0].alone

    def interval(*args: Any, **kwargs: Any) -> Interval:
        (x,) = _intervals((args, kwargs))
        if alone:
            return function(x)
        entries = Interval(*(end.flatten(0, 1) for end in (x.lower, x.upper)))
        y = function(entries)
        return Interval(*(end.reshape(x.batch, *call.shape) for end in (y.lower, y.upper)))

    return interval


def module_interval_of(module: nn.Module, call: Call) -> Callable[..., Interval] | None:
    """Bounds of the values of a module without weights; None where nothing is known of its class."""
    if not arithmetic.has_interval(module):
        return None

    def interval(x: Interval) -> Interval:
        found = arithmetic.module_interval(module, x)
        assert found is not None
        return found

    return by_entries(call, interval)


def constant_sample(call: Call, value: Any) -> Any:
    """A constant operand as it broadcasts to one sample of the output."""
    if isinstance(value, Tensor) and value.dim() == call.rank and call.alone:
        return value[:1]
    return value


def _intervals(value: Any) -> list[Interval]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [x for inner in value for x in _intervals(inner)]
    return [value] if isinstance(value, Interval) else []


def _tensor(call: Call, argument: Any, value: Any, name: str, row: int) -> Any:
    """One end of one domain, as the tensor of the graph, for an argument that is an interval or holds some."""
    if isinstance(value, Interval):
        end = getattr(value, name)
        at = row if value.batch > 1 else 0
        step = argument if isinstance(argument, Step) else call.steps[argument]
        return in_graph(end[at : at + 1], step, call.values.batch)
    if isinstance(value, (tuple, list)):
        parts = call.bundles[argument] if isinstance(argument, fx.Node) else argument
        return type(value)(_tensor(call, part, v, name, row) for part, v in zip(parts, value, strict=True))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
