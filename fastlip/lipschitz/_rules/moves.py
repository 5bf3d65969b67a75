"""Functions that only move values, each to one place, or change the dtype in which they are stored."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._calls import Call, as_function, has_all_values, places_of
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rowwise import by_ends, fixed_values
from fastlip.lipschitz._steps import Step


def _named(*names: str) -> list[Any]:
    """The functions of torch and the tensor methods of some names."""
    return [target for name in names for target in (getattr(torch, name, None), name) if target is not None]


#: Functions that keep all values, in their order.
_IN_ORDER = (
    *_named("flatten", "reshape", "squeeze", "unsqueeze", "clone", "ravel", "unflatten", "detach"),
    *("view", "contiguous", "requires_grad_", "squeeze_", "unsqueeze_"),
)
#: Functions that only move values, each to one place.
_MOVES = (
    *_IN_ORDER,
    *_named("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"),
    *("transpose_", "swapaxes_", "t_"),
)


@builds(*_MOVES, fixed=True)
def _move(call: Call) -> Step | None:
    others: list[fx.Node] = []
    fx.node.map_arg((call.args[1:], call.kwargs), others.append)
    if not call.on_one or others:
        return None
    function = as_function(call.target)
    return _moved(call, lambda x: function(x, *call.args[1:], **call.kwargs), in_order=call.target in _IN_ORDER)


@builds("view_as", "reshape_as")
def _like(call: Call) -> Step:
    """The shape of another tensor, which is known, whether that depends on the input or not."""
    shape = call.values.shapes[call.node]
    if not isinstance(call.args[0], fx.Node):
        return fixed_values(call, lambda x: x.reshape(shape))
    return _moved(call, lambda x: x.reshape(shape), in_order=True)


def _moved(call: Call, function: Callable[[Tensor], Tensor], *, in_order: bool) -> Step:
    if call.values.dtypes[call.node] != call.source_dtype:
        raise missing_rule(f"{call.name} to another dtype", call.where)
    source = call.sources[0]
    module = nn.Identity() if in_order and call.shape == source.shape else None

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return function(x)

    interval = by_ends(call, apply, norm=lambda *norms: norms[0])
    step = Step(call.where, call.name, [source], 1.0, call.shape, module, apply, interval, same=in_order, linear=True)
    step.places = places_of(step, call)
    return step


@builds("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", fixed=True)
def _converted(call: Call) -> Step:
    """A conversion to a dtype that has all values of the input's: it changes none of them."""
    before, after = call.source_dtype, call.values.dtypes[call.node]
    if after.is_complex:
        raise ValueError(f"{call.where}: {call.name} makes complex numbers, which no rule covers")
    if not has_all_values(after, before):
        raise ValueError(f"{call.where}: {call.name} rounds to {after}, and has no Lipschitz constant")

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.to(torch.promote_types(x.dtype, after))

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        return x

    if not isinstance(call.args[0], fx.Node):
        return fixed_values(call, apply)
    sources, same = call.sources[:1], nn.Identity()
    step = Step(call.where, call.name, sources, 1.0, call.shape, same, apply, interval, same=True, linear=True)
    step.places = places_of(step, call)
    return step
