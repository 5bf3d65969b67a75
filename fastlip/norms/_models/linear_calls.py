"""Calls of torch's functions that apply a linear map to one of their arguments, as operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlip.norms._models.layer_output import apply_operator
from fastlip.norms._operators.modules import adjoint_of_transposed, describe_conv
from fastlip.norms._operators.operator import Operator, conv_operator


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The map x to A x + bias of a function.

    Attributes:
        operator: A, or its adjoint.
        transposed: whether ``operator`` is the adjoint.
        bias: [Cout], or None.
        name: what the function is called.
    """

    operator: Operator
    transposed: bool
    bias: Tensor | None
    name: str

    def apply(self, x: Tensor, *, magnitudes: bool = False) -> Tensor:
        """A x + bias in float32 at least, see :func:`apply_operator`."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return apply_operator(self.operator, x, self.bias, transposed=self.transposed, magnitudes=magnitudes)

    def describe(self, name: str) -> str:
        """A short description under this name, see :func:`describe_conv`."""
        op = self.operator
        ends = (op.output_shape, op.input_shape) if self.transposed else (op.input_shape, op.output_shape)
        if not op.kernel:
            return f"{name} {ends[0][0]}→{ends[1][0]}"
        return describe_conv(name, ends[0][0], ends[1][0], op.kernel, op.stride, op.groups, ends[0])


@dataclass(frozen=True, eq=False)
class LinearCall:
    """A call of a function that applies such a map.

    Attributes:
        map: the map.
        x: the input, [B, Cin, *spatial] or [..., features].
        y: the output, in the same order of axes.
        given: the tensor that was given as the weight.
        whole: whether ``y`` is the very tensor that the function returned.
    """

    map: LinearMap
    x: Tensor
    y: Tensor
    given: Tensor
    whole: bool = True


class Pad:
    """What ``F.pad`` does, with zeros or with the input's own values; its arguments but for the input."""

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> None:
        self.mode = "zeros" if mode == "constant" else mode
        # The last axis comes first.
        self.pairs = tuple(zip(pad[::2], pad[1::2], strict=True))[::-1]
        self.usable = not value

    def before(self, operator: Operator) -> Operator | None:
        """The padding and then the operator, as one; None where that is no operator."""
        axes = len(operator.kernel)
        extra = self.pairs[len(self.pairs) - axes :]
        pairs = ((0, 0),) * (axes - len(extra)) + extra
        outer = any(pair != (0, 0) for pair in self.pairs[: len(self.pairs) - axes])
        plain = all(p == (0, 0) for p in operator.padding)
        # What a crop takes away, zero padding does not bring back.
        sum_of_both = self.mode == "zeros" == operator.padding_mode and all(p >= 0 for pair in pairs for p in pair)
        if not self.usable or outer or not (plain or sum_of_both):
            return None
        size = tuple(n - left - right for n, (left, right) in zip(operator.input_size, pairs, strict=True))
        both = [(a + c, b + d) for (a, b), (c, d) in zip(pairs, operator.padding, strict=True)]
        return replace(operator, input_size=size, padding=tuple(both), padding_mode=self.mode)


def _bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor) -> LinearCall | None:
    given = _bind(("input", "weight", "bias"), args, kwargs)
    weight: Tensor = given["weight"]
    if weight.dim() != 2:
        return None
    return _matrix(given["input"], y, weight, weight, given.get("bias"), "linear")


def _matrix(
    x: Tensor, y: Tensor, given: Tensor, matrix: Tensor, bias: Tensor | None, name: str, whole: bool = True
) -> LinearCall:
    return LinearCall(LinearMap(Operator(matrix.detach()), False, bias, name), x, y, given, whole)


def _conv(
    args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, *, axes: int, transposed: bool = False
) -> LinearCall | None:
    names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = _bind(("input", "weight", "bias", "stride", "padding", *names), args, kwargs)
    x, weight = given["input"], given["weight"]
    whole = x.dim() == axes + 2
    if not whole:  # without a batch axis
        x, y = x[None], y[None]
    settings = {name: _expanded(given.get(name, default), axes) for name, default in _CONV_DEFAULTS.items()}
    settings |= {"groups": given.get("groups", 1), "finite": False}
    if transposed:
        operator = adjoint_of_transposed(weight.detach(), x.shape[2:], y.shape[2:], **settings)
    else:
        operator = conv_operator(weight.detach(), x.shape[2:], **settings)
    name = f"{'conv_transpose' if transposed else 'conv'}{axes}d"
    return LinearCall(LinearMap(operator, transposed, given.get("bias"), name), x, y, weight, whole)


_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


def _expanded(value: Any, axes: int) -> Any:
    """Torch takes one number in a list for all axes."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 != axes else value


def _product(args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, is_weight: Callable[[Tensor], bool]) -> Any:
    """A matrix product of two, one of which is a matrix of weights."""
    first, second = args if len(args) == 2 else (*args, *kwargs.values())
    if is_weight(second) and second.dim() == 2 and first.dim() >= 1:
        return _matrix(first, y, second, second.mT, None, "matmul")
    if is_weight(first) and first.dim() == 2 and second.dim() >= 2:
        return _matrix(second.mT, y.mT, first, first, None, "matmul", whole=False)
    return None


def _swapped(args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, is_weight: Callable[[Tensor], bool]) -> Any:
    return _product((args[1], args[0]), {}, y, is_weight)


def _addmm(args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, is_weight: Callable[[Tensor], bool]) -> Any:
    given = _bind(("input", "mat1", "mat2"), args, kwargs)
    bias = given["input"]
    weight: Tensor = given["mat2"]
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or not is_weight(weight) or bias.dim() != 1:
        return None
    return _matrix(given["mat1"], y, weight, weight.mT, bias, "addmm")


def _einsum(args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, is_weight: Callable[[Tensor], bool]) -> Any:
    """A sum over axes that the input shares with the weight and the output does not have.

    All other axes of the weight must be the output's alone, and all others of the input its own and the output's.
    """
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").replace("...", ".").split("->")
    terms = left.split(",")
    at = next((i for i in (1, 0) if is_weight(operands[i])), None)
    if at is None:
        return None
    weight, x, of_weight, of_input = operands[at], operands[1 - at], terms[at], terms[1 - at]
    inner = [a for a in of_weight if a in of_input and a not in out]
    free = [a for a in of_weight if a in out and a not in of_input]
    kept = [a for a in of_input if a not in inner]
    repeated = any(len(set(term)) < len(term) for term in (of_weight, of_input, out))
    if repeated or len(inner) + len(free) < len(of_weight) or sorted(kept + free) != sorted(out) or "." in of_weight:
        return None
    matrix = weight.permute([of_weight.index(a) for a in free + inner])
    rows = matrix.shape[: len(free)].numel()
    matrix = matrix.reshape(rows, -1)
    order = "".join(kept)
    inputs = _axes_last(x, of_input, order, inner)
    outputs = _axes_last(y, out, order, free)
    return _matrix(inputs, outputs, weight, matrix, None, "einsum", whole=False)


def _axes_last(t: Tensor, term: str, kept: str, last: Sequence[str]) -> Tensor:
    """``t``, whose axes a term of an equation names, with its axes ``kept`` and then the ``last`` ones as one."""

    def text(letters: str) -> str:
        return letters.replace(".", "...")

    moved = torch.einsum(f"{text(term)}->{text(kept)}{''.join(last)}", t)
    return moved.flatten(-len(last)) if last else moved[..., None]


Parser = Callable[[Sequence[Any], Mapping[str, Any], Tensor, Callable[[Tensor], bool]], LinearCall | None]


def _second(parse: Callable[..., LinearCall | None], **settings: Any) -> Parser:
    """A parser of a function whose second argument is its weight."""

    def parsed(
        args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, is_weight: Callable[[Tensor], bool]
    ) -> LinearCall | None:
        weight = _bind(("input", "weight"), args, kwargs)["weight"]
        return parse(args, kwargs, y, **settings) if is_weight(weight) else None

    return parsed


_WITH_WEIGHT: dict[Any, Parser] = {
    F.linear: _second(_linear),
    torch.conv1d: _second(_conv, axes=1),
    torch.conv2d: _second(_conv, axes=2),
    torch.conv3d: _second(_conv, axes=3),
    torch.conv_transpose1d: _second(_conv, axes=1, transposed=True),
    torch.conv_transpose2d: _second(_conv, axes=2, transposed=True),
    torch.conv_transpose3d: _second(_conv, axes=3, transposed=True),
}
#: Functions of an input and a weight, in this order.
TAKE_A_WEIGHT = frozenset(_WITH_WEIGHT)
_PARSERS: dict[Any, Parser] = {
    **_WITH_WEIGHT,
    torch.matmul: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
    torch.mm: _product,
    Tensor.mm: _product,
    Tensor.__rmatmul__: _swapped,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.einsum: _einsum,
}


def linear_call(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], y: Any, is_weight: Callable[[Tensor], bool]
) -> LinearCall | None:
    """The call as a linear map whose weight is one of the tensors that are weights; None where it is none.

    Raises:
        ValueError: an argument is not understood.
    """
    parser = _PARSERS.get(function)
    return parser(args, kwargs, y, is_weight) if parser is not None and isinstance(y, Tensor) else None
