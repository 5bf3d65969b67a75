"""The registry of rules, which give the L2 Lipschitz constant of each kind of module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastlip.lipschitz._intervals import Interval
from fastlip.norms import NormInterval, Operator
from fastlip.norms._operators.modules import keeps_forward
from fastlip.norms._operators.registry import find_operator

if TYPE_CHECKING:
    from fastlip.lipschitz._calls import Call
    from fastlip.lipschitz._steps import Step


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A map that scales each channel by its own factor, and may shift it.

    Its factors are multiplied into a neighbouring convolution or linear layer if there is one.

    Attributes:
        scale: factors, [C] float64.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> class Gain(nn.Module):
        ...     def forward(self, x):
        ...         return x * torch.tensor([1.0, 3.0])
        >>> @fastlip.lipschitz.rule(Gain)
        ... def _(module, input_shape):
        ...     return fastlip.lipschitz.Diagonal(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> print(fastlip.lipschitz_bound(nn.Sequential(Gain(), nn.Linear(2, 2)).eval(), (2,)).upper)
    """

    scale: Tensor


Factor = float | NormInterval | Operator | Diagonal


@dataclass(frozen=True, eq=False)
class Ranged:
    """A factor with how large values are: what a rule returns if one depends on, or says something of, the other.

    Attributes:
        factor: as a rule returns it; or a function that takes bounds of the input's values, with a single domain
            (B = 1), and returns an upper bound on the constant there, inf if there is none.
        values: the least and the largest value of the output, numbers or tensors that broadcast to one sample of it;
            or a function from bounds of the input's values, for several domains, to bounds of the output's. None if
            nothing is known of them but what the factor says.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> class Gate(nn.Module):
        ...     def forward(self, x):
        ...         return x.sigmoid()
        >>> @fastlip.lipschitz.rule(Gate)
        ... def _(module, input_shape):
        ...     return fastlip.lipschitz.Ranged(0.25, values=(0.0, 1.0))
        >>> print(fastlip.lipschitz_bound(nn.Sequential(nn.Linear(3, 2), Gate()).eval(), (3,)).upper)
    """

    factor: Factor | Callable[[Interval], float]
    values: tuple[float | Tensor, float | Tensor] | Callable[[Interval], Interval] | None = None


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function on an input that a rule is asked about.

    Attributes:
        args: the positional arguments that follow the input.
        kwargs: the keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Rule = Callable[[Any, tuple[int, ...]], Factor | Ranged]

_RULES: dict[type[nn.Module], Rule] = {}
_LINEAR: set[Rule] = set()
_FUNCTION_RULES: dict[Any, Rule] = {}

#: Makes the step of a call, or one for each tensor in the tuple that it returns; None if the call is not of its kind.
Builder = Callable[["Call"], "Step | Sequence[Step | None] | None"]

_BUILDERS: dict[Any, list[Builder]] = {}
_FIXED: set[Any] = set()


def builds(*targets: Any, fixed: bool = False) -> Callable[[Builder], Builder]:
    """Register what makes the steps of functions, tensor methods (by name) or modules (by class, for subclasses too).

    It is for what :func:`rule` cannot say: several inputs, or more than one constant. Several builders of one target
    are asked in turn. With ``fixed`` a rule that a user registers for the function does not come before them.
    """

    def register(builder: Builder) -> Builder:
        for target in targets:
            _BUILDERS.setdefault(target, []).append(builder)
        if fixed:
            _FIXED.update(targets)
        return builder

    return register


def module_builders(module: nn.Module) -> list[Builder]:
    """The builders of the nearest class that a module derives from; none if its ``forward`` is overridden."""
    for cls in type(module).__mro__:
        if cls in _BUILDERS:
            return _BUILDERS[cls] if keeps_forward(module, cls) else []
    return []


def function_builders(target: Any) -> tuple[list[Builder], bool]:
    """The builders of a function or of a method's name, and whether they come before a rule that a user registers."""
    return _BUILDERS.get(target, []), target in _FIXED


#: What functions and tensor methods are traced as, in place of a call of them.
_TRACED_AS: dict[Any, Callable[..., Any]] = {}
#: Modules of torch that are traced into, unlike others without a rule.
_TRACED_INTO = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def traced_as(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what to trace in place of calls of functions or tensor methods (by name).

    Where it raises NotImplementedError the call is a step of the graph, as if nothing was registered.
    """

    def register(other: Callable[..., Any]) -> Callable[..., Any]:
        _TRACED_AS.update(dict.fromkeys(targets, other))
        return other

    return register


def body_of(target: Any) -> Callable[..., Any] | None:
    """What to trace in place of a call; None for calls that are steps of the graph.

    Python functions of others than torch that :func:`torch.fx.wrap` would hide are traced into. Functions for which a
    user has registered a rule are not.
    """
    if find_function_rule(target) is not None:
        return None
    if target in _TRACED_AS:
        return _TRACED_AS[target]
    hidden = isinstance(target, FunctionType) and not f"{target.__module__}.".startswith(("torch.", "math."))
    return target if hidden and not function_builders(target)[0] else None


def is_traced_into(module: nn.Module) -> bool:
    """Whether a module of torch is traced into, where torch.fx would not."""
    return any(isinstance(module, kind) and keeps_forward(module, kind) for kind in _TRACED_INTO)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is bounded as a whole, so that its forward is not traced."""
    return find_rule(module) is not None or bool(module_builders(module))


def rule(*kinds: type[nn.Module] | Callable[..., Tensor]) -> Callable[[Rule], Rule]:
    """Register the Lipschitz rule of one or more module classes, and of their subclasses that keep their ``forward``.

    Functions have rules as well, ``torch.flip`` and the method ``torch.Tensor.flip`` each its own: for what they do
    with their first argument where no other depends on the model's input. Sums, products, means and reshaping keep
    theirs.

    The decorated function takes the module, in eval mode, or a :class:`FunctionCall` with the other arguments, and the
    shape of one input without its batch axis. It returns an upper bound on the module's L2 Lipschitz constant as a
    float or a :class:`fastlip.norms.NormInterval`, or the linear map itself, as a :class:`fastlip.norms.Operator`
    (whose norm is computed with those of the layers, at one joint confidence) or as a :class:`Diagonal` of factors per
    channel; or a :class:`Ranged` of one of these with how large the values are, which bounds of products need, or with
    a constant that depends on how large the input is. It raises ValueError if no bound exists.

    Raises:
        TypeError: a kind is neither a module class nor a function.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> class Soft(nn.Module):
        ...     def forward(self, x):
        ...         return x / (1 + x.abs())
        >>> @fastlip.lipschitz.rule(Soft)
        ... def _(module, input_shape):
        ...     return 1.0
        >>> class Square(nn.Module):  # whose slope is 2 x
        ...     def forward(self, x):
        ...         return x * x
        >>> @fastlip.lipschitz.rule(Square)
        ... def _(module, input_shape):
        ...     return fastlip.lipschitz.Ranged(lambda x: 2.0 * x.magnitude().max().item())
        >>> model = nn.Sequential(nn.Linear(3, 3), Soft(), Square()).eval()
        >>> print(fastlip.lipschitz_bound(model, (3,), bounds=(0, 1)).upper)
    """
    for kind in kinds:
        if not (issubclass(kind, nn.Module) if isinstance(kind, type) else callable(kind)):
            raise TypeError(f"rule takes module classes and functions, got {kind!r}")

    def register(function: Rule) -> Rule:
        for kind in kinds:
            if isinstance(kind, type):
                _RULES[kind] = function
            else:
                _FUNCTION_RULES[kind] = function
        return function

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of the nearest class that a module derives from; None without one, or if ``forward`` is overridden.

    Without one its rule is the operator that is registered by :func:`fastlip.norms.layer_operator`.
    """
    cls = next((cls for cls in type(module).__mro__ if cls in _RULES), None)
    if cls is not None and keeps_forward(module, cls):
        return _RULES[cls]
    return find_operator(module)


def linear(function: Rule) -> Rule:
    """Register a rule as one of linear maps, which gives the norm with the magnitudes of their coefficients."""
    _LINEAR.add(function)
    return function


def is_linear(module: nn.Module) -> bool:
    """Whether a module's rule was registered by :func:`linear`."""
    return find_rule(module) in _LINEAR


def find_function_rule(target: Any) -> Rule | None:
    """The rule of a traced function, or of the tensor method that a string names; None without one."""
    return _FUNCTION_RULES.get(getattr(Tensor, target, None) if isinstance(target, str) else target)


class MissingRule(ValueError):
    """Something in a graph has no rule; the same model traced in another way may have one for all that is in it."""


def missing_rule(what: str, name: str) -> MissingRule:
    """The error for a module that has no rule, or for an operation that can only have one as part of a module."""
    return MissingRule(
        f"no Lipschitz rule for {what} (at {name}); register one with @fastlip.lipschitz.rule(TheModule), "
        "a function (module, input_shape) -> upper bound on its L2 Lipschitz constant, for the module that does it: "
        "a module of its own with one input, if there is none"
    )


#: Functions that no rule could bound: those that jump, and those that draw random numbers.
_JUMPING = frozenset(
    "round floor ceil trunc fix frac sign sgn heaviside floor_divide floordiv remainder mod fmod gt lt ge le eq ne "
    "greater less greater_equal less_equal argmax argmin argsort bucketize searchsorted".split()
)
_RANDOM = frozenset("rand_like randn_like randint_like bernoulli normal uniform multinomial".split())


def no_rule_possible(target: Any, name: str) -> MissingRule | None:
    """The error for a function or tensor method that has no Lipschitz constant; None for others."""
    function = getattr(Tensor, target, target) if isinstance(target, str) else target
    plain = str(getattr(function, "__name__", function)).strip("_")
    if plain in _JUMPING:
        return MissingRule(
            f"{plain} (at {name}) jumps, and has no Lipschitz constant; where the whole has one, as x * (x > 0) has, "
            "make it an activation of torch, or a module with a rule (@fastlip.lipschitz.rule)"
        )
    if plain in _RANDOM:
        return MissingRule(f"{plain} (at {name}) draws random numbers, so that there is no Lipschitz constant")
    return None


def missing_function_rule(target: Any, name: str) -> MissingRule:
    """The error for a function or tensor method without a rule."""
    if (never := no_rule_possible(target, name)) is not None:
        return never
    function = getattr(Tensor, target, target) if isinstance(target, str) else target
    owner = "torch.Tensor" if isinstance(target, str) else getattr(function, "__module__", None) or "torch"
    shown = getattr(function, "__name__", str(function))
    return MissingRule(
        f"no Lipschitz rule for the function {shown} (at {name}); register one with "
        f"@fastlip.lipschitz.rule({owner.replace('torch._C._nn', 'torch.nn.functional')}.{shown}), a function "
        "(call, input_shape) -> upper bound on its L2 Lipschitz constant, call.args being what follows the input"
    )


def axes_of(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One integer per axis from torch's int-or-tuple arguments."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
