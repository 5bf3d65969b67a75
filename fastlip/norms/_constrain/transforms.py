"""What constraints need to know of what may be around them: transforms of :mod:`torch.func`, exports, autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def unwrapped(t: Tensor) -> Tensor:
    """The tensor that transforms have wrapped."""
    if torch.compiler.is_compiling():
        return t
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def is_batched(t: Tensor) -> bool:
    """Whether ``vmap`` maps over a tensor."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def is_eager() -> bool:
    """Whether neither a transform nor a compiler is at work."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is None


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Leave all transforms, for what computes with tensors that they have not wrapped and changes some in place.

    Nor do functions that are called here pass for a part of a model whose functions are watched, or make their tensors
    on another default device.
    """
    if torch.compiler.is_compiling():
        yield
    elif is_eager():
        with torch._C.DisableTorchFunction():
            yield
    else:
        with torch._C.DisableTorchFunction(), temporarily_clear_interpreter_stack():
            yield


#: Whether an export that is running is one of fastlip's own, which does not outlive its model.
_own_export = False


@contextmanager
def own_export() -> Iterator[None]:
    """Let constrained models be exported, by what uses the program in this process alone."""
    global _own_export
    before, _own_export = _own_export, True
    try:
        yield
    finally:
        _own_export = before


def is_exported() -> bool:
    """Whether torch.export is at work, to make a program that may go elsewhere."""
    return torch.compiler.is_exporting() and not _own_export


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast, which takes longer to enter and leave than to ask for."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
