"""The linear maps of users' own layers, by class."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastlip.norms._operators.modules import keeps_forward
from fastlip.norms._operators.operator import Operator

OperatorOf = Callable[[Any, tuple[int, ...]], Operator]

_OPERATORS: dict[type[nn.Module], OperatorOf] = {}


def layer_operator(*kinds: type[nn.Module]) -> Callable[[OperatorOf], OperatorOf]:
    """Register the linear map of one or more module classes, and of their subclasses that keep their ``forward``.

    The decorated function takes the module, in eval mode, and the shape of one input without its batch axis. It returns
    the map as an :class:`Operator`, without what the layer adds. :func:`fastlip.norms.layer_norms` reports such a layer
    as one, whatever it holds, and compares the map with what the layer does; :func:`fastlip.lipschitz_bound` takes it
    where the class has no rule of its own.

    Raises:
        TypeError: a kind is no module class.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> class Halved(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) / 2
        >>> @fastlip.norms.layer_operator(Halved)
        ... def _(module, input_shape):
        ...     return fastlip.norms.Operator(module.weight.detach() / 2)
        >>> print(fastlip.layer_norms(nn.Sequential(Halved(3, 2)), (3,)))
    """
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"layer_operator takes module classes, got {kind!r}")

    def register(function: OperatorOf) -> OperatorOf:
        for kind in kinds:
            _OPERATORS[kind] = function
        return function

    return register


def find_operator(module: nn.Module) -> OperatorOf | None:
    """The function of the nearest registered class that keeps its ``forward`` in this module, or None."""
    kind = next((cls for cls in type(module).__mro__ if cls in _OPERATORS), None)
    return _OPERATORS[kind] if kind is not None and keeps_forward(module, kind) else None


def registered_operator(module: nn.Module, input_shape: Sequence[int]) -> Operator:
    """The map that is registered for a module.

    Raises:
        TypeError: what the registered function returns is no :class:`Operator`.
    """
    function = find_operator(module)
    assert function is not None
    operator = function(module, tuple(input_shape))
    if not isinstance(operator, Operator):
        raise TypeError(f"the function registered for {type(module).__name__} returned {type(operator).__name__}")
    return operator
