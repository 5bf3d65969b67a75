"""What an attack does to a model: nothing that lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Model = Callable[[Tensor], Tensor]


@contextmanager
def attacked(model: Model) -> Iterator[Model]:
    """The model in eval mode with gradients available, whatever mode the caller is in; modes are put back after.

    Modes are kept per module, because a network may be partly frozen.
    """
    if isinstance(model, DistributedDataParallel):
        # Its forward pass broadcasts buffers, and processes whose images fall at different steps would wait forever.
        model = model.module
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    try:
        for module in training:
            module.training = False
        with torch.inference_mode(False), torch.enable_grad():
            yield model
    finally:
        for module in training:
            module.training = True


def logits_of(
    model: Model,
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """The model's logits [B, C] in float32 at least."""
    logits = model(inputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != inputs.shape[0]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [B, C] with B = {inputs.shape[0]}, got {got}")
    if logits.shape[1] < 2:
        raise ValueError(f"model must return logits of at least 2 classes, got {logits.shape[1]}")
    return logits if logits.dtype == torch.float64 else logits.float()
