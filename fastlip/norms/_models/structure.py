"""A model's structure: everything that it computes with but its numbers, equal for checkpoints of one model."""

import marshal
from collections.abc import Hashable
from functools import partial
from itertools import filterfalse
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import nn

#: Attributes that every module has; of these only hooks of the forward pass can change what it computes.
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type, type(None), torch.dtype, torch.device, torch.memory_format)
_NUMBERS = frozenset((bool, int, float, str, type(None)))
#: Format of marshal in which equal values give equal bytes, however many references they have.
_WITHOUT_REFERENCES = 2


class _UnknownError(Exception):
    """An attribute whose equality says nothing about what the model computes."""


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model once, each before what it holds."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


def structure(model: nn.Module) -> Hashable | None:
    """A value that is equal for models of the same classes, attributes and shapes; None where that is unknown.

    Such models run alike on one input, unless they branch on the numbers in tensors, and :func:`modules_of` lists
    their modules in the same order. Attributes must be plain values or containers of them, and no module may have hooks
    on its forward pass or integers in its buffers, which may count.
    """
    modules = modules_of(model)
    index = {id(module): i for i, module in enumerate(modules)}
    try:
        return tuple(
            (cast(Hashable, type(module)), _children(module, index), *_attributes(module)) for module in modules
        )
    except _UnknownError:
        return None


def _children(module: nn.Module, index: dict[int, int]) -> Hashable:
    return tuple([(name, index[id(child)]) for name, child in module._modules.items() if child is not None])


def _attributes(module: nn.Module) -> tuple[Hashable, ...]:
    """A module's own attributes and tensors; this has to be fast, as it runs for every module of every checkpoint."""
    own = vars(module)
    if any(own[hooks] for hooks in _HOOKS) or isinstance(module, torch.jit.ScriptModule):
        raise _UnknownError
    keys = tuple(filterfalse(_INTERNAL.__contains__, own))
    values = [own[key] for key in keys]
    attributes: Hashable
    if all(map(_is_simple, values)):
        # This distinguishes types and values as exactly as _plain does.
        attributes = marshal.dumps(values, _WITHOUT_REFERENCES)
    else:
        attributes = tuple(map(_plain, values))
    held = [*own["_parameters"].items(), *own["_buffers"].items()]
    for key, tensor in held:
        if tensor is not None and not tensor.is_floating_point() and key != "num_batches_tracked":
            raise _UnknownError
    tensors = tuple([(key, None if t is None else (t.shape, t.dtype, t.device)) for key, t in held])
    return keys, attributes, len(own["_parameters"]), tensors


def _is_simple(value: object) -> bool:
    """Whether a value is a number, a string or a sequence of them, whose types marshal keeps."""
    kind = type(value)
    return kind in _NUMBERS or (kind in (tuple, list) and _NUMBERS.issuperset(map(type, cast("list[object]", value))))


def _plain(value: Any) -> Hashable:
    if isinstance(value, (*_PLAIN, FunctionType, BuiltinFunctionType)):
        return type(value), value  # 1 is not True
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, dict):
        return dict, tuple((_plain(key), _plain(inner)) for key, inner in value.items())
    if isinstance(value, (set, frozenset)):
        return set, frozenset(map(_plain, value))
    if isinstance(value, partial):
        return partial, _plain(value.func), _plain(value.args), _plain(value.keywords)
    raise _UnknownError
