"""The registry of rules, which give the L2 Lipschitz constant of each kind of module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastlip.norms import NormInterval, Operator
from fastlip.norms._operators.modules import keeps_forward


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A map that scales each channel by its own factor, and may shift it.

    Its factors are multiplied into a neighbouring convolution or linear layer if there is one.

    Attributes:
        scale: factors, [C] float64.
    """

    scale: Tensor


Factor = float | NormInterval | Operator | Diagonal
Rule = Callable[[nn.Module, tuple[int, ...]], Factor]

_RULES: dict[type[nn.Module], Rule] = {}


def rule(*modules: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register the Lipschitz rule of one or more module classes, and of their subclasses that keep their ``forward``.

    The decorated function takes the module, in eval mode, and the shape of one input without its batch axis. It returns
    an upper bound on the module's L2 Lipschitz constant as a float or a :class:`fastlip.norms.NormInterval`, or the
    linear map itself, as a :class:`fastlip.norms.Operator` (whose norm is computed with those of the layers, at one
    joint confidence) or as a :class:`Diagonal` of factors per channel. It raises ValueError if no bound exists.

    Example:
        >>> @fastlip.lipschitz.rule(MyActivation)
        ... def _(module, input_shape):
        ...     return 1.0
    """

    def register(function: Rule) -> Rule:
        for module in modules:
            _RULES[module] = function
        return function

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of the nearest class that a module derives from; None without one, or if ``forward`` is overridden."""
    for cls in type(module).__mro__:
        if cls in _RULES:
            return _RULES[cls] if keeps_forward(module, cls) else None
    return None


def missing_rule(what: str, name: str) -> ValueError:
    """The error for something that has no rule."""
    return ValueError(
        f"no Lipschitz rule for {what} (at {name}); register one with @fastlip.lipschitz.rule(TheModule), "
        "a function (module, input_shape) -> upper bound on its L2 Lipschitz constant"
    )


def axes_of(value: int | Sequence[int] | None, axes: int, default: int = 1) -> tuple[int, ...]:
    """One integer per axis from torch's int-or-tuple arguments."""
    if value is None:
        value = default
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
