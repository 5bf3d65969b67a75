"""Products and quotients of tensors that depend on the input: elementwise, and of matrices."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import largest_slice, least, spectral_norm
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds
from fastlip.lipschitz._rowwise import aligned
from fastlip.lipschitz._rules.activations import CONSTANTS
from fastlip.lipschitz._steps import Step

_MULTIPLY = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_DIVIDE = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide")
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MATMUL = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__")


#: Rounding of a few products of numbers.
_ROUNDING = 1e-14
#: The largest sum of a softmax, with rounding.
_ONE = 1.0 + 1e-12


@dataclass(frozen=True)
class Product(Weighted):
    """An elementwise product with broadcasting: a b - a' b' = (a - a') b + a' (b - b').

    Attributes:
        shapes: shapes of one sample of both factors.
        output_shape: shape of one sample of the product.
    """

    name: ClassVar[str] = "product"
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    output_shape: tuple[int, ...]

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        return [
            least([largest_slice(other.magnitude()[0], shape, self.output_shape), self._whole(other)])
            for shape, other in zip(self.shapes, reversed(magnitudes), strict=True)
        ]

    def _whole(self, other: Interval) -> float:
        """The norm of all factors together, where none of them is repeated."""
        return other.norm.item() if other.shape == self.output_shape else math.inf


@dataclass(frozen=True)
class Quotient(Weighted):
    """An elementwise quotient with broadcasting: a / b - a' / b' = (a - a') / b - (a' / b') (b - b') / b.

    Attributes:
        shapes: shapes of one sample of numerator and denominator.
        output_shape: shape of one sample of the quotient.
    """

    name: ClassVar[str] = "quotient"
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    output_shape: tuple[int, ...]

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        numerator, denominator = magnitudes
        one = torch.ones_like(denominator.lower)
        inverse = arithmetic.divide(Interval(one, one), denominator)
        slope = arithmetic.multiply(arithmetic.multiply(numerator, inverse), inverse)
        return [
            largest_slice(inverse.magnitude()[0], self.shapes[0], self.output_shape),
            largest_slice(slope.magnitude()[0], self.shapes[1], self.output_shape),
        ]


@dataclass(frozen=True)
class MatrixProduct(Weighted):
    """Products of matrices, the last two axes: A B - A' B' = (A - A') B + A' (B - B').

    Attributes:
        repeated: how often each matrix of A, and of B, is used.
        stochastic: whether the rows of A are >= 0 and sum up to 1, as those of a softmax.
    """

    name: ClassVar[str] = "matrix product"
    repeated: tuple[float, float]
    stochastic: bool = False

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        a, b = magnitudes
        if self.stochastic:
            return [
                rows_apart(b) * self.repeated[0],
                spectral_norm(a.magnitude()[0], math.inf, _ONE) * self.repeated[1],
            ]
        return [
            spectral_norm(b.magnitude()[0], b.norm.item()) * self.repeated[0],
            spectral_norm(a.magnitude()[0], a.norm.item()) * self.repeated[1],
        ]


@builds(*_MULTIPLY, fixed=True)
def _product(call: Call) -> Step | None:
    if not _of_two(call):
        return None
    for first, second in (call.args, call.args[::-1]):
        step = _gated_by_itself(call, first, second)
        if step is not None:
            return step
    shapes = call.sample_shape(call.args[0]), call.sample_shape(call.args[1])
    inputs = [call.steps[a] for a in call.args]

    def interval(a: Interval, b: Interval) -> Interval:
        result = arithmetic.multiply(a, b)
        return Interval(result.lower.clamp_min(0.0), result.upper, result.norm) if a is b else result

    factor = Product(shapes, call.shape)
    return Step(call.where, call.name, inputs, factor, call.shape, apply=operator.mul, interval=aligned(call, interval))


@builds(*_DIVIDE, fixed=True)
def _quotient(call: Call) -> Step | None:
    if not _of_two(call):
        return None
    shapes = call.sample_shape(call.args[0]), call.sample_shape(call.args[1])
    inputs = [call.steps[a] for a in call.args]
    factor = Quotient(shapes, call.shape)
    apply, interval = operator.truediv, aligned(call, arithmetic.divide)
    return Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=interval)


@builds(*_MATMUL, fixed=True)
def _matrix_product(call: Call) -> Step | None:
    if not _of_two(call):
        return None
    a, b = (call.sample_shape(node) for node in call.args)
    if len(a) < 2 or len(a) != len(b):
        return None
    repeated = tuple(math.sqrt(math.prod(call.shape[:-2]) / max(math.prod(s[:-2]), 1)) * (1.0 + 1e-15) for s in (a, b))
    inputs = [call.steps[node] for node in call.args]
    stochastic = is_stochastic(inputs[0])
    factor = MatrixProduct((repeated[0], repeated[1]), stochastic)
    apply, interval = torch.matmul, averaged if stochastic else arithmetic.matmul
    return Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=interval)


def rows_apart(x: Interval) -> float:
    """Upper bound on the spectral norm of matrices, the last two axes, less one vector that is taken off all rows."""
    magnitude = x.magnitude()[0]
    whole = spectral_norm(magnitude, x.norm.item())
    if not magnitude.numel() or not math.isfinite(whole):
        return whole
    lower, upper = x.lower[0], x.upper[0]
    common = 0.5 * lower.amin(-2, keepdim=True) + 0.5 * upper.amax(-2, keepdim=True)
    apart = torch.maximum(upper - common, common - lower).clamp_min(0.0) * _ONE
    return least([whole, spectral_norm(apart, math.inf)])


def averaged(shares: Interval, x: Interval) -> Interval:
    """Bounds of averages of the rows of x with shares that sum up to 1: no average lies outside of its elements."""
    product = arithmetic.matmul(shares, x)
    shape = product.lower.shape
    # Shares that are rounded sum up to 1 but for rounding.
    slack = _ROUNDING * x.magnitude().amax(-2, keepdim=True)
    lower = (x.lower.amin(-2, keepdim=True) - slack).expand(shape)
    upper = (x.upper.amax(-2, keepdim=True) + slack).expand(shape)
    return product.intersection(Interval(lower, upper))


def is_stochastic(step: Step) -> bool:
    """Whether a step's rows, along its last axis, are those of a softmax."""
    while type(step.module) in (nn.Identity, nn.Dropout) and step.inputs[0].shape == step.shape:
        step = step.inputs[0]
    module = step.module
    return type(module) is nn.Softmax and module.dim == -1


def _of_two(call: Call) -> bool:
    """Whether the call has two traced tensors and nothing else."""
    traced = [isinstance(a, fx.Node) and a in call.steps for a in call.args]
    return traced == [True, True] and not call.kwargs


def _gated_by_itself(call: Call, x: fx.Node, gate: fx.Node) -> Step | None:
    """The step of y times an activation of a y, where that product is an activation with a constant of its own.

    They are y sigmoid(a y), y hardsigmoid(a y), y relu6(a y + 3), y tanh(softplus(a y)) and y (1 + erf(a y)): SiLU,
    Hardswish, Mish and GELU of a y, divided by a, whose constant is that of the activation for each a.
    """
    base, outer = _scaled(call, x)
    gate, number = _scaled(call, gate)
    found = _activation(call, gate)
    if found is None or call.sample_shape(x) != call.shape:
        return None
    module, argument, own = found
    same, inner = _scaled(call, argument)
    if same is not base or outer * inner == 0.0:
        return None
    number, slope = number * own, (inner * _ARGUMENTS[type(module)]) / outer
    at = call.args.index(x)

    def apply(*args: Tensor) -> Tensor:
        return module(args[at] * slope) * (number / slope)

    def interval(*args: Interval) -> Interval:
        inside = arithmetic.module_interval(module, arithmetic.scale(args[at], slope, _ROUNDING))
        assert inside is not None
        return arithmetic.scale(inside, number / slope, _ROUNDING)

    factor = CONSTANTS[type(module)] * abs(number) * (1.0 + _ROUNDING)
    return Step(call.where, call.name, [call.steps[x]], factor, call.shape, apply=apply, interval=interval)


#: By what a gate's argument is multiplied to get that of the activation: GELU's erf takes x / sqrt(2).
_ARGUMENTS: dict[type[nn.Module], float] = {nn.SiLU: 1.0, nn.Hardswish: 1.0, nn.Mish: 1.0, nn.GELU: math.sqrt(2.0)}


def _activation(call: Call, gate: fx.Node) -> tuple[nn.Module, fx.Node, float] | None:
    """The activation whose gate a node is, the gate's argument, and the number that the gate is multiplied by."""
    module = _module(call, gate)
    if type(module) is nn.Sigmoid:
        return nn.SiLU(), _source(call, gate), 1.0
    if type(module) is nn.Hardsigmoid:
        return nn.Hardswish(), _source(call, gate), 1.0
    if type(module) is nn.Tanh and type(soft := _module(call, _source(call, gate))) is nn.Softplus:
        if soft.beta == 1.0 and soft.threshold >= 20.0:
            return nn.Mish(), _source(call, _source(call, gate)), 1.0
    if type(module) is nn.ReLU6:
        base, offset = _shifted(call, _source(call, gate))
        return (nn.Hardswish(), base, 6.0) if offset == 3.0 else None
    base, offset = _shifted(call, gate)
    if offset == 1.0 and call.steps[base].kind in ("erf", "erf_") and not call.steps[base].module:
        return nn.GELU(), _source(call, base), 2.0
    return None


def _module(call: Call, node: fx.Node) -> nn.Module | None:
    return call.steps[node].module


def _source(call: Call, node: fx.Node) -> fx.Node:
    """The only tensor that a node reads."""
    return next(n for n in node.all_input_nodes if n in call.steps)


def _scaled(call: Call, node: fx.Node) -> tuple[fx.Node, float]:
    """A node that is a number times another one: that and the number; otherwise itself and 1."""
    number = 1.0
    while node.op != "call_module" and len(node.args) == 2 and node.target in (*_MULTIPLY, *_DIVIDE):
        constant = _number(call, node)
        if constant is None or (node.target in _DIVIDE and not isinstance(node.args[0], fx.Node)):
            break
        number = number * constant if node.target in _MULTIPLY else number / constant
        node = _source(call, node)
    return node, number


def _shifted(call: Call, node: fx.Node) -> tuple[fx.Node, float]:
    """A node that is another one plus a number: that and the number; otherwise itself and 0."""
    if node.op != "call_module" and len(node.args) == 2 and node.target in _ADD:
        constant = _number(call, node)
        if constant is not None:
            return _source(call, node), constant
    return node, 0.0


def _number(call: Call, node: fx.Node) -> float | None:
    """The number among the two arguments of a node, None if there is none."""
    for argument in node.args:
        value = call.values.constants.get(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
    return None
