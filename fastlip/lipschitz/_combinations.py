"""How the constant of a step with several inputs follows from the constants of these."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastlip.lipschitz._log_arithmetic import add, half, multiply


class Combination(ABC):
    """What a step makes of the constants of its inputs.

    Attributes:
        name: what it is called in the parts of a bound.
    """

    name: ClassVar[str]

    @abstractmethod
    def constant(self, logs: Sequence[float], magnitudes: Sequence[Any]) -> float:
        """log10 of the constant from the model's input to the step, rounded upwards.

        Args:
            logs: log10 of the constants from the model's input to each of the step's inputs.
            magnitudes: how large these inputs can be.
        """


@dataclass(frozen=True)
class Sum(Combination):
    """A sum: the constants add up."""

    name: ClassVar[str] = "sum"

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Any]) -> float:
        return add(logs)


@dataclass(frozen=True)
class Difference(Sum):
    """A difference, whose constants add up as well."""

    name: ClassVar[str] = "difference"


@dataclass(frozen=True)
class Concatenation(Combination):
    """Inputs side by side: the root of the sum of the constants' squares."""

    name: ClassVar[str] = "concatenation"

    def constant(self, logs: Sequence[float], magnitudes: Sequence[Any]) -> float:
        return half(add(multiply(log, log) for log in logs))
