"""Forward and backward counts: how many images went through a model, and for how many a gradient came back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.attacks._outputs import logits_in


@dataclass
class PassCounts:
    """Numbers of images that went through a model.

    Attributes:
        forward: images in forward passes.
        backward: images in backward passes.
    """

    forward: int = 0
    backward: int = 0

    def add(self, output: Tensor) -> None:
        """Count the forward pass that gave ``output`` [B, ...], and its backward pass once that happens."""
        images = output.shape[0]
        self.forward += images
        if output.requires_grad:
            output.register_hook(lambda grad: self._add_backward(images))

    def _add_backward(self, images: int) -> None:
        self.backward += images


#: The counts in progress, each with the module that it belongs to. A faster copy of that module reports its own passes.
_in_progress: list[tuple[nn.Module, PassCounts]] = []


@contextmanager
def count_forward_backward(model: nn.Module) -> Iterator[PassCounts]:
    """Count the images that pass through ``model`` inside the ``with`` block, whoever sends them.

    The images that an attack sends through a faster copy of the model (``fast``, ``precision``) are counted as well.

    Raises:
        TypeError: ``model`` is not a module, or is TorchScript, which cannot be watched.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> with attacks.count_forward_backward(model) as counts:
        ...     adversarial = attacks.pgd(model, images, labels, eps=8 / 255, steps=5)
        >>> print(counts.forward, counts.backward)
    """
    # The attacks call the module inside a DistributedDataParallel.
    watched = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(watched, nn.Module):
        raise TypeError(f"model must be an nn.Module to count its passes, got {type(model).__name__}")
    counts = PassCounts()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # The batch's size is that of what came out, whatever one logit for each image stands for.
        logits = logits_in(output, -1)
        if isinstance(logits, Tensor):
            counts.add(logits)

    try:
        handle = watched.register_forward_hook(hook)
    except RuntimeError:
        raise TypeError(
            f"model must be an nn.Module to count its passes, got TorchScript ({type(model).__name__})"
        ) from None
    entry = (watched, counts)
    _in_progress.append(entry)
    try:
        yield counts
    finally:
        handle.remove()
        _in_progress[:] = [e for e in _in_progress if e is not entry]


def can_be_counted(model: Any) -> TypeGuard[nn.Module]:
    """Whether :func:`count_forward_backward` takes the model."""
    try:
        with count_forward_backward(model):
            return True
    except TypeError:
        return False


def report(model: object, output: Tensor) -> None:
    """Add a pass that a faster copy of ``model`` made to the counts of ``model`` that are in progress."""
    for watched, counts in _in_progress:
        if watched is model:
            counts.add(output)


def report_replayed(model: object, images: int) -> None:
    """Add an iteration that was replayed on so many images to the counts of ``model`` that are in progress."""
    for watched, counts in _in_progress:
        if watched is model:
            counts.forward += images
            counts.backward += images
