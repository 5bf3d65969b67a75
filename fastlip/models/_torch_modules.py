"""timm's layers as torch's own, which norms, Lipschitz bounds and distributed training know."""

from typing import Any

import torch
from torch import nn

from fastlip.models._calls import Call, calls
from fastlip.models._extra import timm
from fastlip.models._stems import replace_module


class Expanded(nn.Sequential):
    """One layer written as several modules, of which ``layer`` has the weights; the state dict is that of one layer."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.register_state_dict_post_hook(_without_layer)
        self.register_load_state_dict_pre_hook(_with_layer)


def stored_name(model: nn.Module, name: str) -> str:
    """The name of a submodule in the state dict of ``model``: its own, unless it is part of a layer of timm's.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> print(fastlip.models.stored_name(model, "0"))
    """
    parent, _, child = name.rpartition(".")
    return parent if child == "layer" and isinstance(model.get_submodule(parent), Expanded) else name


def _without_layer(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}layer.")]:
        state[prefix + key.removeprefix(f"{prefix}layer.")] = state.pop(key)


def _with_layer(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in module.get_submodule("layer").state_dict():
        if prefix + key in state:
            state[f"{prefix}layer.{key}"] = state.pop(prefix + key)


def expand_timm_layers(network: nn.Module, shape: tuple[int, int, int]) -> None:
    """Replace timm's BatchNorm with activation, and its padding by input size, by torch's modules, in place.

    What the network computes on images of ``shape`` [C, H, W], its weights and their names stay as they are.
    """
    layers = timm().layers
    ran, _ = calls(network, shape)
    for call in ran:
        if type(call.module) is layers.BatchNormAct2d and call.times == 1:
            replace_module(network, call.name, _norm_and_activation(call.module))
        elif type(call.module) is layers.Conv2dSame and call.times == 1:
            replace_module(network, call.name, _padded(call))


def _norm_and_activation(module: Any) -> nn.Module:
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    norm._parameters.update(module._parameters)
    norm._buffers.update(module._buffers)
    norm.train(module.training)
    parts = {"drop": module.drop, "act": module.act}
    return Expanded(layer=norm, **{k: v for k, v in parts.items() if not isinstance(v, nn.Identity)})


def _padded(call: Call) -> nn.Module:
    """The convolution behind padding that makes the output as large as the input over the stride, rounded upwards."""
    conv = call.module
    assert isinstance(conv, nn.Conv2d)
    assert call.input is not None
    ends = []
    for n, kernel, stride, dilation in zip(
        call.input.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        total = max((-(-n // stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0)
        ends.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = ends
    symmetric = top == bottom and left == right
    padding = (top, left) if symmetric else 0
    two_axes: dict[str, Any] = {"kernel_size": conv.kernel_size, "stride": conv.stride, "dilation": conv.dilation}
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        **two_axes,
        padding=padding,
        groups=conv.groups,
        bias=conv.bias is not None,
        device=torch.device("meta"),
    )
    plain._parameters.update(conv._parameters)
    return plain if symmetric else Expanded(pad=nn.ZeroPad2d((left, right, top, bottom)), layer=plain)
