"""What a model computes with, apart from the numbers: equal for checkpoints of one model."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

#: What every module has; of these only hooks of the forward pass can change what it computes.
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type, type(None), torch.dtype, torch.device, torch.memory_format)
_NUMBERS = frozenset((bool, int, float, str, type(None)))
_MOST_KEPT = 16

T = TypeVar("T")


class _UnknownError(Exception):
    """Something whose equality says nothing of its effect."""


def structure(model: nn.Module) -> Hashable | None:
    """Equal for models of the same classes, attributes and shapes; None where that cannot be said.

    Such models run alike on one input but for what branches on the numbers in tensors. Attributes must be plain values
    or containers of them, and no module may have hooks on its forward pass or integers in its buffers, which may count.
    """
    seen: dict[int, int] = {}
    try:
        return tuple(
            (name, seen.setdefault(id(module), len(seen)), type(module), _attributes(module))
            for name, module in model.named_modules(remove_duplicate=False)
        )
    except _UnknownError:
        return None


def _attributes(module: nn.Module) -> Hashable:
    own = vars(module)
    if any(own[hooks] for hooks in _HOOKS) or isinstance(module, torch.jit.ScriptModule):
        raise _UnknownError
    found: list[Hashable] = []
    for key, value in own.items():
        if key in _INTERNAL:
            continue
        kind = type(value)
        if kind in _NUMBERS:  # the most, and quickly: this runs for every attribute of every checkpoint
            found.append((key, kind, value))
        elif kind is tuple and _NUMBERS.issuperset(map(type, value)):
            found.append((key, value, *map(type, value)))
        else:
            found.append((key, _plain(value)))
    for held in (own["_parameters"], own["_buffers"]):
        for key, tensor in held.items():
            if tensor is not None and not tensor.is_floating_point() and key != "num_batches_tracked":
                raise _UnknownError
            found.append((key, None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)))
    return tuple(found)


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


class Remembered(Generic[T]):
    """Results of a function of models that depend on their structure alone, for the last few structures."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __call__(self, model: nn.Module, *arguments: Hashable) -> T:
        """What the function made of ``model`` and ``arguments``, or of a model like it."""
        key = structure(model)
        if key is None:
            return self._function(model, *arguments)
        purpose = (key, arguments)
        if purpose in self._kept:
            self._kept.move_to_end(purpose)
            return self._kept[purpose]
        made = self._kept[purpose] = self._function(model, *arguments)
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return made
