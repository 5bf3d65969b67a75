"""Functions and tensor methods that do what a module with a rule does."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._factors import module_factor
from fastlip.lipschitz._registry import missing_rule
from fastlip.lipschitz._rowwise import module_interval_of
from fastlip.lipschitz._rules.moving_modules import describe_linear_module
from fastlip.lipschitz._steps import Step

_BY_NAME: dict[str, Callable[..., nn.Module]] = {
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
    "softshrink": lambda lambd=0.5: nn.Softshrink(lambd),
    "hardshrink": lambda lambd=0.5: nn.Hardshrink(lambd),
    "threshold": lambda threshold, value, inplace=False: nn.Threshold(threshold, value),
    "_threshold": lambda threshold, value, inplace=False: nn.Threshold(threshold, value),
    "rrelu": lambda lower=1 / 8, upper=1 / 3, training=False, inplace=False: _rrelu(lower, upper, training),
    "glu": lambda dim=-1: nn.GLU(dim),
    "local_response_norm": lambda size, alpha=1e-4, beta=0.75, k=1.0: nn.LocalResponseNorm(size, alpha, beta, k),
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


def _rrelu(lower: float, upper: float, training: bool) -> nn.Module:
    if training:
        raise ValueError("rrelu runs with training=True also in eval mode; use training=self.training")
    return nn.RReLU(lower, upper).eval()


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
    for name, build in _BY_NAME.items():
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
        table[getattr(F, f"lp_pool{axes}d")] = getattr(nn, f"LPPool{axes}d")
        table[getattr(F, f"adaptive_avg_pool{axes}d")] = getattr(nn, f"AdaptiveAvgPool{axes}d")
        table[getattr(F, f"adaptive_max_pool{axes}d")] = getattr(nn, f"AdaptiveMaxPool{axes}d")
    for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
        table[function] = _dropout
    table[F.interpolate] = _interpolate
    return table


_MODULES = _table()


def step_by_module(call: Call) -> Step | None:
    """The step of a function that does what a module with a rule does, or None if there is no such module.

    Raises:
        ValueError: the module has no bound, or the function has other arguments than are known here.
    """
    build = _MODULES.get(call.target)
    if build is None:
        return None
    try:
        module = build(*call.args[1:], **call.kwargs)
    except (AssertionError, RuntimeError, TypeError):
        raise missing_rule(f"{call.name} with these arguments", call.where) from None
    except ValueError as error:
        raise ValueError(f"{call.where}: {error}") from None
    stated = module_factor(module, call.where, call.sources[0].entry_shape, call.shape, call.source_dtype)
    forward = module.forward
    step = Step(
        call.where,
        call.name,
        call.sources,
        stated.factor,
        call.shape,
        module,
        apply=lambda x, *_, **__: forward(x),
        interval=stated.interval or module_interval_of(module, call),
    )
    describe_linear_module(step, call)
    return step
