"""Functions and tensor methods in a traced graph, and the modules that do the same."""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

#: Functions that keep all values, in their order.
MOVE_IN_ORDER = (
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.clone,
    "flatten",
    "reshape",
    "view",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
)
#: Functions that only move values, each to one place.
MOVE = (*MOVE_IN_ORDER, torch.permute, torch.transpose, "permute", "transpose")

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": lambda inplace=False: nn.ReLU(),
    "relu6": lambda inplace=False: nn.ReLU6(),
    "tanh": lambda: nn.Tanh(),
    "sigmoid": lambda: nn.Sigmoid(),
    "silu": lambda inplace=False: nn.SiLU(),
    "mish": lambda inplace=False: nn.Mish(),
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "hardswish": lambda inplace=False: nn.Hardswish(),
    "hardsigmoid": lambda inplace=False: nn.Hardsigmoid(),
    "hardtanh": lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    "selu": lambda inplace=False: nn.SELU(),
    "elu": lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    "celu": lambda alpha=1.0, inplace=False: nn.CELU(alpha),
    "leaky_relu": lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    "softplus": lambda beta=1.0, threshold=20.0: nn.Softplus(beta, threshold),
    "softsign": lambda: nn.Softsign(),
    "logsigmoid": lambda: nn.LogSigmoid(),
}


def _max_pool(
    cls: Callable[..., nn.Module],
) -> Callable[..., nn.Module]:
    def build(
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> nn.Module:
        return cls(kernel_size, stride or None, padding, dilation, ceil_mode=ceil_mode)

    return build


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    if training:
        raise ValueError("dropout runs with training=True also in eval mode; use training=self.training")
    return nn.Identity()


def _interpolate(
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> nn.Module:
    if antialias:
        raise ValueError("interpolate with antialias has no Lipschitz rule")
    return nn.Upsample(size, scale_factor, mode, align_corners, recompute_scale_factor)


def _table() -> dict[Any, Callable[..., nn.Module]]:
    table: dict[Any, Callable[..., nn.Module]] = {}
    for name, build in _ACTIVATIONS.items():
        for key in (name, f"{name}_"):
            table[key] = build
            for place in (F, torch):
                if hasattr(place, key):
                    table[getattr(place, key)] = build
    for axes in (1, 2, 3):
        pool = _max_pool(getattr(nn, f"MaxPool{axes}d"))
        for place in (F, torch):
            table[getattr(place, f"max_pool{axes}d")] = pool
        table[getattr(F, f"avg_pool{axes}d")] = getattr(nn, f"AvgPool{axes}d")
        table[getattr(F, f"adaptive_avg_pool{axes}d")] = getattr(nn, f"AdaptiveAvgPool{axes}d")
        table[getattr(F, f"adaptive_max_pool{axes}d")] = getattr(nn, f"AdaptiveMaxPool{axes}d")
    for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
        table[function] = _dropout
    table[F.interpolate] = _interpolate
    return table


_MODULES = _table()

ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACT = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
DIVIDE = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
CONCATENATE = (torch.cat, torch.concat, torch.concatenate)
MEAN = (torch.mean, "mean")


def as_function(target: Any) -> Callable[..., Any]:
    """A traced target as a function of its arguments; a target that is a string names a tensor method."""
    if not isinstance(target, str):
        return cast("Callable[..., Any]", target)
    return lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)


def as_module(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """The module that does the same as ``target(x, *args, **kwargs)``, or None if there is none."""
    build = _MODULES.get(target)
    return None if build is None else build(*args, **kwargs)
