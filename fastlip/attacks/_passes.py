"""Counts of how many images went through a model, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Passes:
    """Images that went through a model.

    Attributes:
        forward: images in forward passes.
        backward: images in backward passes.
    """

    forward: int = 0
    backward: int = 0

    def watch(self, output: Tensor) -> None:
        """Count a forward pass that gave ``output`` [B, ...], and its backward pass where there will be one."""
        images = output.shape[0]
        self.forward += images
        if output.requires_grad:
            output.register_hook(lambda grad: self._add_backward(images))

    def _add_backward(self, images: int) -> None:
        self.backward += images


#: Counters in use, each with the module that it watches: a faster copy of that module reports to it by itself.
_active: list[tuple[nn.Module, Passes]] = []


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Passes]:
    """Count the images that pass through ``model`` inside the ``with`` block, whoever sends them.

    What an attack sends through a faster copy of the model (``fast``, ``precision``) counts as well.

    Raises:
        TypeError: ``model`` is no module.
    """
    # The attacks call what DistributedDataParallel wraps.
    watched = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(watched, nn.Module):
        raise TypeError(f"model must be an nn.Module to count its passes, got {type(model).__name__}")
    passes = Passes()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            passes.watch(output)

    handle = watched.register_forward_hook(hook)
    entry = (watched, passes)
    _active.append(entry)
    try:
        yield passes
    finally:
        handle.remove()
        _active[:] = [e for e in _active if e is not entry]


def report(model: object, output: Tensor) -> None:
    """Tell those who count the passes of ``model`` of one that a copy of it made."""
    for watched, passes in _active:
        if watched is model:
            passes.watch(output)
