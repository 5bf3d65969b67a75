"""The model inside a data-parallel wrapper, or inside what ``torch.compile`` made."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from fastlip.norms._models.hooks import has_hooks


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper or what ``torch.compile`` made, or the model itself.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: part of it is TorchScript, or a wrapper has hooks of its own on the forward pass.
    """
    require_module(model)
    inner = model.module if isinstance(model, (nn.DataParallel, DistributedDataParallel)) else model
    inner = getattr(inner, "_orig_mod", inner)
    if inner is not model:
        if has_hooks(model):
            raise ValueError(
                f"{type(model).__name__} has hooks on its forward pass, which what it wraps lacks; register them on "
                "the model inside"
            )
        return bare_model(inner)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run a lazy model once on an input before")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f" (at {name})" if name else ""
            raise ValueError(f"model holds TorchScript{where}, which cannot be looked into; give what it was made of")
    return model


def require_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
