"""A model in eval mode, whatever mode it is found in."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastlip.norms._models.restore import as_found, random_state
from fastlip.norms._models.wrappers import require_module


def require_eval(model: nn.Module, training: bool, used: Iterable[nn.Module]) -> None:
    """Check that those of the layers ``used`` that depend on the mode are in eval mode, or will be.

    Args:
        model: the model.
        training: whether it was found in training mode.
        used: layers that the model uses.

    Raises:
        ValueError: a layer is in training mode although the model is not, and so stays there in :func:`eval_mode`; or
            the model is in training mode, and a module around such a layer overrides ``train`` or ``eval``, so that
            only that method knows what eval mode would be.
    """
    dependent = {m for m in used if isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p > 0.0)}
    for name, module in model.named_modules() if dependent else ():
        if not training and module.training and module in dependent:
            raise ValueError(
                f"module {name or type(module).__name__} ({type(module).__name__}) is in training mode though the "
                "model is in eval mode, so that what it does depends on the batch or on chance; call model.eval() first"
            )
        own = type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
        if training and own and any(m in dependent for m in module.modules()):
            raise ValueError(
                f"{type(module).__name__}{f' (at {name})' if name else ''} has a train() or eval() of its own, which "
                "decides over layers that depend on the mode; call model.eval() first"
            )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, outside of inference mode, autocast and compiled code, to run and trace it.

    Modes are set as flags, since ``train()`` and ``eval()`` may do something (LoRA layers merge their weights); in a
    model that is in eval mode itself every module keeps the mode it has. Afterwards the model is as it was found, see
    :func:`as_found`, and so is the random state.

    Raises:
        TypeError: it is no module.
        ValueError: the model wrote into its own parameters, and they are too large for a copy.
    """
    require_module(model)
    devices = {t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(as_found(model, parameters=True))
        stack.enter_context(random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if model.training:
            for module in model.modules():
                vars(module)["training"] = False  # without calling a __setattr__ of the module
        for module in model.modules():
            vars(module)["_compiled_call_impl"] = None
        yield
