"""Functions that apply a layer with weights that do not depend on the input: convolutions, linear maps, BatchNorm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Diagonal, builds, missing_rule
from fastlip.lipschitz._steps import Step
from fastlip.norms import batchnorm_scale, module_operator
from fastlip.norms._models.layer_output import apply_operator

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LAYERS: dict[Any, tuple[Callable[..., nn.Module], Sequence[str]]] = {
    F.conv1d: (nn.Conv1d, _CONV),
    F.conv2d: (nn.Conv2d, _CONV),
    F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
}


@builds(F.linear)
def _linear(call: Call) -> Step:
    given = _constants(call, ("input", "weight", "bias"))
    weight = given["weight"]
    if weight.dim() != 2:
        raise missing_rule(f"{call.name} with a weight of {weight.dim()} axes", call.where)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    return _layer(call, module, weight, given.get("bias"))


@builds(*_LAYERS)
def _convolution(call: Call) -> Step:
    kind, names = _LAYERS[call.target]
    given = _constants(call, names)
    weight = given["weight"]
    settings = {name: given[name] for name in names[3:] if name in given}
    groups = settings.get("groups", 1)
    transposed = names is _TRANSPOSED
    channels = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    )
    module = kind(*channels, tuple(weight.shape[2:]), bias=False, device="meta", **settings)
    return _layer(call, module, weight, given.get("bias"), transposed=transposed)


def _layer(call: Call, module: nn.Module, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Step:
    """The step of a function that does what a module does with these weights."""
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    try:
        factor = module_operator(module, call.sources[0].entry_shape)
    except ValueError as error:
        raise ValueError(f"{call.where}: {error}") from None

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return apply_operator(factor, x, bias, transposed=transposed)

    source = call.sources[0]

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        if source.alone or not factor.kernel:
            return arithmetic.through_operator(factor, x, bias, transposed=transposed)
        entries = Interval(x.lower.flatten(0, 1), x.upper.flatten(0, 1))
        y = arithmetic.through_operator(factor, entries, bias, transposed=transposed)
        return Interval(y.lower.unflatten(0, (x.batch, -1)), y.upper.unflatten(0, (x.batch, -1)))

    sources = call.sources
    return Step(call.where, call.name, sources, factor, call.shape, module, apply=apply, interval=interval)


@builds(F.batch_norm, torch.batch_norm)
def _batch_norm(call: Call) -> Step:
    names: tuple[str, ...] = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    if call.target is torch.batch_norm:
        names = (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "training",
            "momentum",
            "eps",
            "cudnn_enabled",
        )
    given = {"training": False, "eps": 1e-5} | _constants(call, names)
    if given["training"] or given.get("running_mean") is None or given.get("running_var") is None:
        raise ValueError(f"{call.where}: {call.name} uses the statistics of its batch, which no Lipschitz rule covers")
    return by_statistics(
        call, given["running_mean"], given["running_var"], given.get("weight"), given.get("bias"), given["eps"]
    )


def by_statistics(
    call: Call, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Step:
    """The step of a normalisation of channels by statistics [C] that are constant."""
    if not call.alone:
        raise missing_rule(f"{call.name} of a tensor whose first axis is not the batch's", call.where)
    module = nn.BatchNorm1d(len(variance), eps=eps, affine=False).eval()
    module.running_mean, module.running_var = mean, variance
    for name, value in (("weight", weight), ("bias", bias)):
        setattr(module, name, None if value is None else nn.Parameter(value.detach(), requires_grad=False))
    scale = batchnorm_scale(module)
    centre = mean.detach().double()
    shift = -scale * centre
    if bias is not None:
        shift = shift + bias.detach().double()

    def channels(t: Tensor, x: Tensor) -> Tensor:
        return t.to(x).view(-1, *(1,) * (x.dim() - 2))

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.addcmul(channels(shift, x), x, channels(scale, x))

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        y = arithmetic.scale(x, channels(scale, x.lower), 1e-14)
        # The error of the shift, which is a product and a sum.
        slack = 1e-14 * (scale.abs() * centre.abs() + shift.abs())
        offset = channels(shift, x.lower)
        margin = channels(slack, x.lower)
        return Interval(arithmetic.shift(y, offset - margin).lower, arithmetic.shift(y, offset + margin).upper)

    sources = call.sources
    return Step(call.where, call.name, sources, Diagonal(scale), call.shape, apply=apply, interval=interval)


def _constants(call: Call, names: Sequence[str]) -> dict[str, Any]:
    """The arguments that follow the input, by name.

    Raises:
        ValueError: the input is not the only traced tensor.
    """
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    later = {name: value for name, value in given.items() if name != names[0]}
    if not isinstance(given.get(names[0]), fx.Node) or any(isinstance(value, fx.Node) for value in later.values()):
        raise missing_rule(f"{call.name} with weights that depend on the input", call.where)
    return later
