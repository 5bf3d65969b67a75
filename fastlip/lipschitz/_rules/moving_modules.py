"""Rules of modules that only move values, each to one place, perhaps with zeros around them."""

from torch import nn

from fastlip.lipschitz._calls import Call, places_of
from fastlip.lipschitz._registry import find_rule, is_linear, linear, rule
from fastlip.lipschitz._steps import Step

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
