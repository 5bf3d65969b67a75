"""Rules of modules that only move values, each to one place, perhaps with zeros around them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._registry import find_rule, is_linear, linear, rule
from fastlip.lipschitz._steps import Step, in_graph, in_sample

#: Modules that keep all values, in their order; dropout does nothing in eval mode.
_IN_ORDER = (
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)


@linear
@rule(*_IN_ORDER)
def _in_order(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    return 1.0


@linear
@rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def _moving(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    return 1.0


@linear
@rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
def _zero_padding(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    return 1.0


def describe_linear_module(step: Step, call: Call) -> None:
    """Say of the step of a module's call whether it is linear, and what it does to the order of values."""
    assert step.module is not None
    step.linear, step.same = is_linear(step.module), find_rule(step.module) is _in_order
    if find_rule(step.module) in (_in_order, _moving):
        step.places = places_of(step, call)


def places_of(step: Step, call: Call) -> Callable[[], Tensor] | None:
    """Where what a step moves comes from; None among several samples, from one of which to another it may move."""
    if call.values.batch > 1:
        return None
    (source,) = step.inputs
    settings = {key: value for key, value in call.kwargs.items() if not isinstance(value, fx.Node)}

    def places() -> Tensor:
        numbers = torch.arange(math.prod(source.shape), dtype=torch.float64).view(1, *source.shape)
        return in_sample(step.apply(in_graph(numbers, source, 1), *call.args[1:], **settings), step).flatten().long()

    return places
