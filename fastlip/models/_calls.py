"""What the modules of a network are given and return in one forward pass, in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.models._quiet import undisturbed


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: qualified name of the module.
        module: the module.
        start: number of calls that began before it.
        input: its first argument, None if that is no tensor.
        output: what it returned, None if that is no tensor.
        times: number of calls of the module in this pass.
    """

    name: str
    module: nn.Module
    start: int
    input: Tensor | None
    output: Tensor | None = None
    times: int = 1


def calls(model: nn.Module, shape: Sequence[int], batch: int = 2) -> tuple[list[Call], Any]:
    """The calls of all modules, in the order in which they end, and the model's output.

    The model runs in eval mode on random images in [0, 1] and is left as it was, random states included. Outputs are
    differentiable with respect to the input.

    Args:
        model: the network.
        shape: [C, H, W] of one image.
        batch: number of images.
    """
    found: list[Call] = []
    open_calls: list[Call] = []
    last: dict[int, Call] = {}
    started = 0

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal started
            given = args[0] if args else next(iter(kwargs.values()), None)
            open_calls.append(Call(name, module, started, given if isinstance(given, Tensor) else None))
            started += 1

        return hook

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = open_calls.pop()
        call.output = output if isinstance(output, Tensor) else None
        if id(module) in last:
            call.times = last[id(module)].times + 1
        last[id(module)] = call
        found.append(call)

    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(begin(name), with_kwargs=True))
            handles.append(module.register_forward_hook(end, with_kwargs=True))
        with undisturbed(model, training=False), torch.enable_grad():
            output = model(images.requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    for call in found:
        call.times = last[id(call.module)].times
    return found, output
