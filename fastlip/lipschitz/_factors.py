"""What rules say of a module or function, checked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastlip.lipschitz._combinations import Combination, Weighted
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Diagonal, Factor, FunctionCall, Ranged, Rule, find_rule, missing_rule
from fastlip.lipschitz._rules.activations import require_continuous
from fastlip.norms import NormInterval, Operator


@dataclass(frozen=True, eq=False)
class Stated:
    """A step's factor, and the bounds of its values as a function of the call's arguments (None if unknown)."""

    factor: Factor | Combination
    interval: Callable[..., Interval] | None = None


@dataclass(frozen=True, eq=False)
class Steepness(Weighted):
    """One input, whose constant is multiplied by one that depends on how large it is.

    Attributes:
        largest_slope: the largest slope for values within given bounds; inf if there is none.
        where: the step, for errors.
    """

    name: ClassVar[str] = "rule"
    largest_slope: Callable[[Interval], float]
    where: str

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        slope = float(self.largest_slope(magnitudes[0]))
        if not slope >= 0.0:
            raise ValueError(f"{self.where}: the constant for values within bounds is {slope}, not a number >= 0")
        return [slope]


def module_factor(
    module: nn.Module,
    name: str,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Stated:
    """The factor that a module's rule gives it on inputs of one shape and dtype; errors name the module."""
    found = find_rule(module)
    if found is None:
        raise missing_rule(type(module).__name__, name)
    try:
        require_continuous(module, dtype)
        result = found(module, input_shape)
    except ValueError as error:
        raise ValueError(f"module {name}: {error}") from None
    return _checked(result, f"{type(module).__name__} (at {name})", output_shape, (Operator, Diagonal))


def function_factor(
    rule: Rule,
    call: FunctionCall,
    name: str,
    where: str,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
) -> Stated:
    """The factor that a function's rule gives a call of it; errors name the function."""
    try:
        result = rule(call, input_shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return _checked(result, f"{name} (at {where})", output_shape, ())


def _checked(result: Any, of: str, output_shape: tuple[int, ...], maps: tuple[type, ...]) -> Stated:
    """What a rule returned, with maps of the given classes allowed.

    Raises:
        ValueError: it is nothing that a rule may return.
    """
    ranged = result if isinstance(result, Ranged) else Ranged(result)
    factor, values = ranged.factor, ranged.values
    interval = None if values is None else _following(values, output_shape, of)
    if isinstance(factor, (int, float)):
        if not 0.0 <= factor < math.inf:
            raise ValueError(f"the rule of {of} returned {factor}, not a finite bound >= 0")
        return Stated(factor, interval)
    if callable(factor) and not isinstance(factor, (NormInterval, Operator, Diagonal)):
        return Stated(Steepness(factor, of), interval)
    if not isinstance(factor, (NormInterval, *maps)):
        kinds = "a float, NormInterval, Operator, Diagonal or Ranged" if maps else "a float, NormInterval or Ranged"
        raise ValueError(f"the rule of {of} returned {type(factor).__name__}, not {kinds}")
    return Stated(factor, interval)


def _following(values: Any, output_shape: tuple[int, ...], of: str) -> Callable[..., Interval]:
    """Bounds of a step's values, as a function of the call's arguments."""
    if callable(values):
        return lambda *args, **kwargs: values(_first(args, kwargs))
    try:
        lower, upper = values
        box = Interval.box(lower, upper, output_shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the rule of {of} returned values that are no bounds of its output: {error}") from None

    def interval(*args: Any, **kwargs: Any) -> Interval:
        like = _first(args, kwargs)
        ends = (end.to(like.lower.device).expand(like.batch, *output_shape) for end in (box.lower, box.upper))
        return Interval(*ends)

    return interval


def _first(args: Sequence[Any], kwargs: dict[str, Any]) -> Interval:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Interval))
