"""The steps of modules with a rule, and what they compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._calls import Call, copied
from fastlip.lipschitz._combinations import Combination
from fastlip.lipschitz._factors import module_factor
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Diagonal, Factor, find_rule, missing_rule
from fastlip.lipschitz._rowwise import by_entries, module_interval_of
from fastlip.lipschitz._rules.layers import batchnorm, weighted
from fastlip.lipschitz._rules.moving_modules import describe_linear_module
from fastlip.lipschitz._steps import Step
from fastlip.norms import Operator, module_operator
from fastlip.norms._models.closeness import agree, rounding_of
from fastlip.norms._models.layer_output import apply_operator
from fastlip.norms._operators.modules import TRANSPOSED

#: Relative error of a BatchNorm's factors.
_ROUNDING = 1e-14


def module_step(call: Call) -> Step:
    """The step of a module with a rule.

    Raises:
        ValueError: it has several inputs, or the rule raises it; the message names the module.
    """
    module, name, sources = call.target, call.where, call.sources
    if len(sources) != 1:
        raise missing_rule(f"{type(module).__name__} with {len(sources)} inputs", name)
    if call.node not in call.values.shapes:
        raise missing_rule(f"{type(module).__name__} of something other than a tensor", name)
    stated = module_factor(module, name, sources[0].entry_shape, call.shape, call.source_dtype)
    factor = stated.factor
    step = Step(name, call.name, sources, factor, call.shape, module, interval=stated.interval)
    step.alone = call.alone
    if find_rule(module) is weighted:
        if len(call.args) + len(call.kwargs) > 1:
            step.factor = layer_operator(step)  # a transposed convolution with an explicit output size
        step.apply = _weighted_map(module, step.factor)
        step.interval = by_entries(call, _weighted_interval(module, step.factor))
        return step
    if isinstance(factor, Diagonal) and find_rule(module) is batchnorm:
        step.apply = _batchnorm_map(module, factor)
        step.interval = by_entries(call, _batchnorm_interval(module, factor))
        return step
    step.apply = _forward(module)
    describe_linear_module(step, call)
    if step.interval is None:
        step.interval = module_interval_of(module, call)
    if isinstance(factor, (Operator, Diagonal)):
        linear = _linear_map(step.apply, factor)
        x = torch.rand(2, *sources[0].entry_shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        x = x.to(call.source_device, call.source_dtype)
        if _is_map(linear, step.apply, x):
            step.apply = linear
        else:  # its norm is a bound, but the map itself cannot be folded or added to a skip connection
            step.exact = False
    return step


def _is_map(linear: Callable[..., Tensor], forward: Callable[..., Tensor], x: Tensor) -> bool:
    """Whether the map that a rule returned is what the module computes; False if they cannot be compared."""
    try:
        return agree(linear(x), forward(x), 10.0 * rounding_of(x))
    except (RuntimeError, TypeError, ValueError):  # other shapes, or a forward that needs more arguments
        return False


def _forward(module: nn.Module) -> Callable[..., Tensor]:
    """A module's forward without its hooks, on copies of the arguments."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = fx.node.map_aggregate((args, kwargs), copied)
        return type(module).forward(module, *args, **kwargs)

    return forward


def _weighted_map(module: nn.Module, factor: Factor | Combination) -> Callable[..., Tensor]:
    """The map of a layer with torch's own rule, computed by the operator that is bounded."""
    assert isinstance(factor, Operator)
    transposed = isinstance(module, TRANSPOSED)

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if x.dim() == len(factor.input_shape):  # without a batch axis
            return apply_operator(factor, x[None], module.bias, transposed=transposed)[0]  # type: ignore[arg-type]
        return apply_operator(factor, x, module.bias, transposed=transposed)  # type: ignore[arg-type]

    return apply


def _batchnorm_map(module: nn.Module, factor: Diagonal) -> Callable[..., Tensor]:
    """A BatchNorm in eval mode, computed by the factors that are bounded."""
    shift = -factor.scale * module.running_mean.detach().double()  # type: ignore[operator]
    if module.bias is not None:
        shift = shift + module.bias.detach().double()  # type: ignore[operator]

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        ones = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(shift.to(x).view(ones), x, factor.scale.to(x).view(ones))

    return apply


def _weighted_interval(module: nn.Module, factor: Factor | Combination) -> Callable[[Interval], Interval]:
    assert isinstance(factor, Operator)
    bias: Any = module.bias
    transposed = isinstance(module, TRANSPOSED)
    return lambda x: arithmetic.through_operator(factor, x, bias, transposed=transposed)


def _batchnorm_interval(module: nn.Module, factor: Diagonal) -> Callable[[Interval], Interval]:
    mean: Any = module.running_mean
    offset: Any = module.bias

    def interval(x: Interval) -> Interval:
        ones = (-1, *(1,) * (len(x.shape) - 1))
        centred = arithmetic.shift(x, -mean.detach().double().view(ones))
        y = arithmetic.scale(centred, factor.scale.view(ones).to(x.lower), _ROUNDING)
        return y if offset is None else arithmetic.shift(y, offset.detach().double().view(ones))

    return interval


def _linear_map(forward: Callable[..., Tensor], factor: Operator | Diagonal) -> Callable[..., Tensor]:
    """The linear map that a user's rule returned, with the module's offset added."""

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if isinstance(factor, Diagonal):
            y = x * factor.scale.to(x).view(-1, *(1,) * (x.dim() - 2))
        else:
            y = apply_operator(factor, x) if x.shape[1:] == factor.input_shape else x.new_zeros(0)
        shift = forward(torch.zeros_like(x[:1]))
        return y + shift if y.shape[1:] == shift.shape[1:] else y

    return apply


def layer_operator(step: Step, **scales: Any) -> Operator:
    """The linear map of a layer with torch's own rule, for the shapes of its step, and with scaled channels."""
    assert step.module is not None
    return module_operator(step.module, step.inputs[0].entry_shape, output_size=step.entry_shape[1:], **scales)


def takes_scale(step: Step) -> bool:
    """Whether the step is a layer with torch's own rule whose channels can be scaled."""
    return (
        isinstance(step.factor, Operator)
        and step.module is not None
        and find_rule(step.module) is weighted
        and (not isinstance(step.module, nn.Linear) or len(step.shape) == 1)
    )
