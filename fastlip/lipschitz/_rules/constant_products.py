"""Matrix products and sums of products with a tensor that does not depend on the input."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import copies
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import builds
from fastlip.lipschitz._rowwise import on_samples
from fastlip.lipschitz._steps import Step


@builds(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", fixed=True)
def _matmul(call: Call) -> Step | None:
    """A product with a constant matrix, or with several."""
    if len(call.args) != 2 or call.kwargs or len(call.sources) != 1:
        return None
    first = isinstance(call.args[1], Tensor)
    constant = call.args[1] if first else call.args[0]
    shape = _graph_shape(call)
    if not isinstance(constant, Tensor) or constant.dim() < 2 or len(shape) < 2:
        return None
    # Matrices that are used for several others multiply their copies.
    lead = torch.broadcast_shapes(shape[:-2], constant.shape[:-2])
    factor = _largest_norm(constant) * copies(shape[:-2], lead)
    return _linear(call, torch.matmul, factor, constant, constant.shape[-2] if first else constant.shape[-1])


@builds(torch.einsum, fixed=True)
def _einsum(call: Call) -> Step | None:
    """A product with a constant tensor, whose letters say which axes are summed, kept in both, or free."""
    equation = call.args[0]
    operands = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], (tuple, list)) else call.args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or len(call.sources) != 1 or call.kwargs:
        return None
    left, _, out = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if (
        len(letters) != 2
        or "->" not in equation
        or "." in equation
        or any(len(set(s)) < len(s) for s in (*letters, out))
    ):
        return None
    at = 0 if isinstance(operands[0], fx.Node) else 1
    constant, x, w = operands[1 - at], letters[at], letters[1 - at]
    if not isinstance(constant, Tensor) or not isinstance(operands[at], fx.Node):
        return None
    sizes = dict(zip(x, _graph_shape(call), strict=True))
    kept = [c for c in w if c in x and c in out]
    summed = [c for c in w if c in x and c not in out]
    free = [c for c in w if c not in x and c in out]
    gone = [w.index(c) for c in w if c not in x and c not in out]
    matrices = constant.detach().double()
    matrices = matrices.sum(gone) if gone else matrices
    rest = [c for c in w if c in x or c in out]
    matrices = matrices.permute([rest.index(c) for c in (*kept, *free, *summed)])
    blocks = math.prod(matrices.shape[: len(kept)])
    rows = math.prod(matrices.shape[len(kept) : len(kept) + len(free)])
    # What only x has, and the sum leaves no trace of, is summed up first.
    lost = math.prod(sizes[c] for c in x if c not in w and c not in out)
    factor = _largest_norm(matrices.reshape(blocks, rows, -1)) * math.sqrt(lost) * (1.0 + EPS)
    terms = constant.numel() * max(lost, 1)

    def product(*pair: Tensor) -> Tensor:
        return torch.einsum(equation, *pair)

    return _linear(call, product, factor, constant, terms, at=at)


def _graph_shape(call: Call) -> tuple[int, ...]:
    """Shape of the traced tensor among the arguments, with all axes."""
    return next(call.values.shapes[n] for n in call.node.all_input_nodes if n in call.steps)


def _largest_norm(
    matrices: Tensor,  # [..., n, m]
) -> float:
    """Upper bound on the largest spectral norm of several matrices."""
    if not matrices.numel():
        return 0.0
    if not bool(torch.isfinite(matrices).all()):
        raise ValueError("a constant matrix that is not finite has no norm")
    return torch.linalg.matrix_norm(matrices.detach().double(), 2).max().item() * (1.0 + 1e-12)


def _linear(
    call: Call, function: Callable[..., Tensor], factor: float, constant: Tensor, terms: int, at: int | None = None
) -> Step:
    """The step of a product with a constant.

    Args:
        call: the call.
        function: the product of both operands in order.
        factor: its norm.
        constant: the constant operand.
        terms: number of products in the longest sum that is one element of the output.
        at: place of the traced tensor among the operands.
    """
    if at is None:
        at = 0 if isinstance(call.args[0], fx.Node) else 1
    source, held = call.sources[0], constant.detach().double()

    def with_(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def by(t: Tensor) -> Tensor:
            return function(t, weight.to(t)) if at == 0 else function(weight.to(t), t)

        return by

    def interval(*args: Any, **_: Any) -> Interval:
        x = next(a for a in _flat(args) if isinstance(a, Interval))
        maps = (on_samples(with_(w), source, call.alone, call.values.batch) for w in (held, held.abs()))
        return arithmetic.linear(*maps, x, terms)

    def apply(*args: Any, **_: Any) -> Tensor:
        x = [a for a in _flat(args) if isinstance(a, Tensor)][at]
        return with_(held)(x)

    return Step(call.where, call.name, [source], factor, call.shape, apply=apply, interval=interval)


def _flat(args: Sequence[Any]) -> list[Any]:
    return [b for a in args for b in (_flat(a) if isinstance(a, (tuple, list)) else [a])]
