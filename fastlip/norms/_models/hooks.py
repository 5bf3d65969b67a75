"""Whether calling a module runs more than its ``forward``."""

from torch import nn
from torch.nn.modules import module as torch_module


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of its own on its forward pass."""
    return bool(vars(module).get("_forward_hooks") or vars(module).get("_forward_pre_hooks"))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks run with the module: its own, or those of all modules."""
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(everywhere) or has_hooks(module)


def is_intercepted(module: nn.Module) -> bool:
    """Whether calling a module may do more than its ``forward``: by hooks, or a ``__call__`` of its own."""
    return is_hooked(module) or type(module).__call__ is not nn.Module.__call__
