"""Functions that copy, move or drop elements, or fill in constants: indexing, splitting, repeating, padding and others.

Each element of the output is one of the input, or a constant. The norm of such a map is the root of how often the most
used element appears, which is counted on a tensor of indices.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import copies
from fastlip.lipschitz._calls import Call, as_function, places_of
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import axes_of, builds, missing_rule
from fastlip.lipschitz._rowwise import fixed_values, on_samples
from fastlip.lipschitz._steps import Step, in_graph, in_sample
from fastlip.norms._models.linear_calls import Pad

#: Added to each index in turn: what follows them is an element of the input, and all else a constant.
_MARKS = (0.28125, 0.40625)

_ONE: tuple[Any, ...] = (
    *(operator.getitem, torch.select, torch.narrow, torch.index_select, "select", "narrow", "index_select"),
    *(torch.Tensor.expand, "expand", torch.broadcast_to, "broadcast_to"),
    *(torch.Tensor.repeat, "repeat", torch.tile, "tile", torch.repeat_interleave, "repeat_interleave"),
    *(torch.roll, "roll", torch.flip, "flip", torch.fliplr, torch.flipud, torch.rot90, "rot90"),
    *(torch.diagonal, "diagonal", torch.tril, "tril", torch.triu, "triu", "unfold", F.unfold),
    *(torch.constant_pad_nd, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.channel_shuffle),
    *(torch.masked_fill, "masked_fill", torch.gather, "gather", torch.take_along_dim, "take_along_dim"),
    *(torch.scatter, "scatter", torch.index_fill, "index_fill"),
)
_SEVERAL: tuple[Any, ...] = (
    *(torch.split, "split", torch.split_with_sizes, "split_with_sizes", torch.chunk, "chunk", "tensor_split"),
    *(torch.tensor_split, torch.unbind, "unbind", torch.unsafe_chunk, torch.unsafe_split),
)
#: Modules that pad, and with what.
_PADS: dict[Any, str] = {
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "circular"),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), "constant"),
}


@builds(*_ONE)
def _selection(call: Call) -> Step | None:
    if not call.on_one or "reduce" in call.kwargs:
        return None
    return _step(call, as_function(call.target), call.shape)


@builds("expand_as")
def _expanded(call: Call) -> Step:
    """The shape of another tensor, which is known, whether that depends on the input or not."""
    shape = call.values.shapes[call.node]
    if not isinstance(call.args[0], fx.Node):
        return fixed_values(call, lambda x: x.expand(shape))
    return _step(replace(call, args=call.args[:1], sources=call.sources[:1]), lambda x, *_: x.expand(shape), call.shape)


@builds("copy_")
def _overwritten(call: Call) -> Step | None:
    """What is copied, in the shape of what it overwrites, of which nothing is left."""
    if len(call.args) < 2 or not isinstance(call.args[1], fx.Node) or call.args[1] not in call.steps:
        return None
    shape, dtype = call.values.shapes[call.node], call.values.dtypes[call.args[1]]
    if call.values.dtypes[call.node] != dtype:
        raise missing_rule(f"{call.name} to another dtype", call.where)
    source = call.steps[call.args[1]]
    factor = copies(source.shape, call.shape)
    on = on_samples(lambda x: x.expand(shape), source, call.alone, call.values.batch)

    def apply(_: Tensor, x: Tensor, *__: Any, **___: Any) -> Tensor:
        return x.expand(shape)

    def interval(_: Any, x: Interval, *__: Any, **___: Any) -> Interval:
        return Interval(on(x.lower), on(x.upper), x.norm * (factor * (1.0 + 4.0 * EPS)))

    return Step(call.where, call.name, [source], factor, call.shape, apply=apply, interval=interval)


@builds(*_SEVERAL)
def _selections(call: Call) -> list[Step | None] | None:
    if not call.on_one:
        return None
    function = as_function(call.target)

    def part(index: int) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: function(*args, **kwargs)[index]

    return [None if s is None else _step(call, part(index), s) for index, s in enumerate(call.part_shapes)]


@builds(*_PADS)
def _padding_module(call: Call) -> Step | None:
    if len(call.sources) != 1:
        return None
    module = call.target
    step = _step(call, lambda x: type(module).forward(module, x), call.shape)
    mode = next((_PADS[cls] for cls in type(module).__mro__ if cls in _PADS), "")
    step.pad = Pad(module.padding, mode, getattr(module, "value", None))
    return step


@builds(F.pad)
def _padding(call: Call) -> Step | None:
    if not call.on_one:
        return None
    step = _step(call, lambda x, *_, **__: F.pad(x, *call.args[1:], **call.kwargs), call.shape)
    step.pad = Pad(*call.args[1:], **call.kwargs)
    return step


@builds(nn.Unfold)
def _windows(call: Call) -> Step | None:
    if len(call.sources) != 1:
        return None
    module = call.target
    return _step(call, lambda x: type(module).forward(module, x), call.shape)


@builds(F.fold, nn.Fold)
def _overlapping_sum(call: Call) -> Step | None:
    """The adjoint of :func:`torch.nn.functional.unfold`, which copies each element to the windows that contain it."""
    names = ("input", "output_size", "kernel_size", "dilation", "padding", "stride")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    if isinstance(call.target, nn.Fold):
        given |= {name: getattr(call.target, name) for name in names[1:]}
    if not call.on_one or not call.alone or any(isinstance(given.get(name), fx.Node) for name in names[1:]):
        return None
    size, kernel = axes_of(given["output_size"], 2), axes_of(given["kernel_size"], 2)
    settings = {name: value for name, value in given.items() if name not in names[:2]}
    uses, _ = _uses(lambda x: F.unfold(x, **settings), torch.zeros(1, 1, *size, dtype=torch.float64))
    factor = int(uses.max()) ** 0.5 * (1.0 + EPS)

    def function(x: Tensor) -> Tensor:
        return F.fold(x, size, **settings)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return function(x)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        y = arithmetic.monotone_linear(function, x, math.prod(kernel))
        return Interval(y.lower, y.upper, x.norm * (factor * (1.0 + 4.0 * EPS)))

    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval)


def _step(call: Call, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Step:
    """The step of a function that selects elements of its first argument.

    Args:
        call: the call.
        function: what it does, as a function of the node's arguments.
        shape: shape of one sample of the output.

    Raises:
        MissingRule: it does something else, or depends on the input otherwise.
    """
    node = next(n for n in call.node.all_input_nodes if n in call.steps)
    if call.args and any(isinstance(a, fx.Node) for a in (*call.args[1:], *call.kwargs.values())):
        raise missing_rule(f"{call.name} by what depends on the input", call.where)

    def apply(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The function, with constants that it may fill in in the input's dtype."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: _in_dtype(a, x.dtype))
        return function(x, *args, **kwargs)

    def on(x: Tensor) -> Tensor:
        return apply(x, *call.args[1:], **call.kwargs)

    source, batch = call.steps[node], call.values.batch
    like = torch.zeros(call.values.shapes[node], dtype=torch.float64, device=call.source_device)
    uses, rest = _uses(on, like)
    if rest is None:
        raise missing_rule(f"{call.name} that computes", call.where)
    times = int(uses.max()) if uses.numel() else 0
    factor = times**0.5 * (1.0 + EPS * (times > 1))

    def interval(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        def rows(end: Tensor) -> Tensor:
            made = (apply(in_graph(row[None], source, batch), *args, **kwargs) for row in end)
            return torch.cat([in_sample(t, step) for t in made])

        return Interval(rows(x.lower), rows(x.upper), None if rest.any() else x.norm * (factor * (1.0 + 4.0 * EPS)))

    step = Step(
        *(call.where, call.name, call.sources, factor, shape),
        apply=apply,
        interval=interval,
        selected=(uses > 0).cpu(),
        linear=not rest.any(),
    )
    if len(rest) == 0 and int(uses.sum()) == like.numel() and times <= 1:
        step.places = places_of(step, call)
    return step


def _in_dtype(a: Any, dtype: torch.dtype) -> Any:
    return a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a


def _uses(function: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor | None]:
    """How often each element of a tensor is selected, [elements], and all that is not, which are constants.

    They are None where the function does something else to some elements. ``like`` has the shape, in float64.
    """
    numbers = torch.arange(like.numel(), dtype=torch.float64, device=like.device).view(like.shape)
    # A constant is the same for both marks.
    first, second = (function(numbers + mark).double().flatten() - mark for mark in _MARKS)
    selected = (first == second) & (first == first.round()) & (first >= 0.0) & (first < like.numel())
    rest = (first + _MARKS[0])[~selected]
    constant = bool((rest == (second + _MARKS[1])[~selected]).all())
    return torch.bincount(first[selected].long(), minlength=like.numel()), rest if constant else None
