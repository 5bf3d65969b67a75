"""Functions that are traced as others which have rules: products and sums, blends, lengths of pairs."""

import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlip.lipschitz._calls import dense
from fastlip.lipschitz._registry import traced_as


@traced_as(operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
def _matmul(input: Tensor, other: Tensor, **others: Any) -> Tensor:
    """A product with a constant matrix is a linear layer, which is followed as such."""
    if not others and _is_matrix(other) and isinstance(input, fx.Proxy):
        return F.linear(input, dense(other).mT)
    if not others and _is_matrix(input) and isinstance(other, fx.Proxy) and other.dim() > 2:
        return F.linear(other.mT, dense(input)).mT
    raise NotImplementedError


@traced_as(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Tensor:
    """A contraction of one axis with a constant matrix, which puts another in its place, is a linear layer."""
    if not isinstance(equation, str) or len(operands) != 2:
        raise NotImplementedError
    terms, _, result = equation.replace(" ", "").partition("->")
    of_x, of_matrix = terms.split(",")
    x, matrix = operands
    if isinstance(matrix, fx.Proxy):
        of_x, of_matrix, x, matrix = of_matrix, of_x, matrix, x
    axes = of_x.removeprefix("...")
    gone, new = (set(of_matrix) & set(axes)) - set(result), set(of_matrix) - set(axes)
    followed = isinstance(x, fx.Proxy) and _is_matrix(matrix) and len(of_matrix) == 2
    if not (followed and len(gone) == len(new) == 1):
        raise NotImplementedError
    (old,), (other,) = gone, new
    if len(set(axes)) < len(axes) or "." in axes or result != of_x.replace(old, other):
        raise NotImplementedError
    at = axes.index(old) - len(axes)
    weight = dense(matrix) if of_matrix == other + old else dense(matrix).mT
    return F.linear(x.movedim(at, -1), weight).movedim(-1, at)


def _is_matrix(t: Any) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, fx.Proxy) and t.dim() == 2 and t.numel() > 0


@traced_as(torch.addmm, "addmm")
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **others: Any) -> Tensor:
    if others:
        raise NotImplementedError
    product = torch.matmul(mat1, mat2)
    if alpha != 1:
        product = alpha * product
    if beta == 0:  # torch ignores the input, whatever it holds
        return product
    return product + (input if beta == 1 else beta * input)


@traced_as(torch.baddbmm, "baddbmm")
def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, **others: Any) -> Tensor:
    return _addmm(input, batch1, batch2, **others)


@traced_as(torch.lerp, "lerp")
def _lerp(input: Tensor, end: Tensor, weight: Tensor | float, **others: Any) -> Tensor:
    if others:
        raise NotImplementedError
    if isinstance(weight, fx.Proxy):  # its slope is the distance of both
        return input + weight * (end - input)
    return (1 - weight) * input + weight * end


@traced_as(torch.tensordot)
def _tensordot(
    a: Tensor, b: Tensor, dims: int | Sequence[Sequence[int] | int] = 2, *, out: Tensor | None = None
) -> Tensor:
    if out is not None or isinstance(dims, Tensor):
        raise NotImplementedError
    if isinstance(dims, int):
        of_a, of_b = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        of_a, of_b = ([d] if isinstance(d, int) else list(d) for d in dims)
    of_a, of_b = [d % a.dim() for d in of_a], [d % b.dim() for d in of_b]
    free_a, free_b = ([d for d in range(t.dim()) if d not in used] for t, used in ((a, of_a), (b, of_b)))
    kept_a, kept_b = [a.shape[d] for d in free_a], [b.shape[d] for d in free_b]
    terms = math.prod(a.shape[d] for d in of_a)
    left = a.permute(*free_a, *of_a).reshape(*kept_a, terms)
    right = b.permute(*of_b, *free_b).reshape(terms, math.prod(kept_b))
    return torch.matmul(left, right).reshape(*kept_a, *kept_b)


@traced_as(torch.linalg.multi_dot)
def _multi_dot(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        raise NotImplementedError
    return reduce(torch.matmul, tensors)


@traced_as(torch.hypot, "hypot")
def _hypot(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is not None or input.shape != other.shape:
        raise NotImplementedError
    return torch.linalg.vector_norm(torch.stack([input, other], -1), dim=-1)
