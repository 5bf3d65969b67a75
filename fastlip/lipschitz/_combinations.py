"""How the constant of a step follows from the constants of its inputs, and from how large these are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._log_arithmetic import add, half, log10, multiply


class Combination(ABC):
    """What a step makes of the constants of its inputs: of sums of two for each, at most the sum of both results.

    Attributes:
        name: what it is called in the parts of a bound.
    """

    name: ClassVar[str]

    @abstractmethod
    def constant(self, logs: Sequence[float], magnitudes: Sequence[Interval]) -> float:
        """log10 of the constant from the model's input to the step, rounded upwards.

        Args:
            logs: log10 of the constants from the model's input to each of the step's inputs.
            magnitudes: bounds of the values of these inputs, B = 1; empty unless the combination is :class:`Weighted`.
        """


@dataclass(frozen=True)
class Sum(Combination):
    """A sum: the constants add up."""

    name: ClassVar[str] = "sum"

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Interval]) -> float:
        return add(logs)


@dataclass(frozen=True)
class Difference(Sum):
    """A difference, whose constants add up as well."""

    name: ClassVar[str] = "difference"


@dataclass(frozen=True)
class BroadcastSum(Combination):
    """A sum or difference with broadcasting: each constant counts times the root of the copies of an element.

    Attributes:
        repeated: that root for each input.
    """

    name: ClassVar[str] = "sum"
    repeated: tuple[float, ...]

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Interval]) -> float:
        return weighted_sum(logs, [log10(times) for times in self.repeated])


@dataclass(frozen=True)
class Concatenation(Combination):
    """Inputs side by side: the root of the sum of the constants' squares."""

    name: ClassVar[str] = "concatenation"

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Interval]) -> float:
        return half(add(multiply(log, log) for log in logs))


class Weighted(Combination):
    """A sum of the inputs' constants, each times a weight that depends on how large the inputs are."""

    @abstractmethod
    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        """The weight of each input, rounded upwards; inf where there is none for values as large as these."""

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Interval]) -> float:
        return weighted_sum(logs, [log10(weight) for weight in self.weights(magnitudes)])


def weighted_sum(logs: Sequence[float], weights: Sequence[float]) -> float:
    """log10 of the sum of constants, each times its weight, from log10 of both."""
    return add(multiply(log, weight) for log, weight in zip(logs, weights, strict=True))
