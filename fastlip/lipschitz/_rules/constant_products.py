"""Matrix products with a tensor that does not depend on the input."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import copies
from fastlip.lipschitz._calls import Call, dense
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds
from fastlip.lipschitz._rowwise import on_samples
from fastlip.lipschitz._steps import Step


@builds(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", fixed=True)
def _matmul(call: Call) -> Step | None:
    """A product with a constant matrix, or with several, of which each has its own norm."""
    if len(call.args) != 2 or call.kwargs or len(call.sources) != 1:
        return None
    at = 0 if isinstance(call.args[0], fx.Node) else 1
    constant, shape = call.args[1 - at], call.values.shapes[call.args[at]]
    if not isinstance(constant, Tensor) or constant.dim() < 2 or len(shape) < 2:
        return None
    held, source = dense(constant.detach()).double(), call.sources[0]
    # A matrix of the input that is multiplied by several constant ones is copied first.
    lead = torch.broadcast_shapes(shape[:-2], held.shape[:-2])
    factor = _largest_norm(held, call.where) * copies(shape[:-2], lead)
    terms = held.shape[-2] if at == 0 else held.shape[-1]

    def by(matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda t: t @ matrix.to(t) if at == 0 else matrix.to(t) @ t

    def interval(*args: Any) -> Interval:
        product, sums = (on_samples(by(m), source, call.alone, call.values.batch) for m in (held, held.abs()))
        return arithmetic.linear(product, sums, args[at], terms)

    def apply(*args: Tensor) -> Tensor:
        return by(held)(args[at])

    return Step(call.where, call.name, [source], factor, call.shape, apply=apply, interval=interval)


def _largest_norm(
    matrices: Tensor,  # [..., n, m] float64
    where: str,
) -> float:
    """Upper bound on the largest spectral norm of several matrices."""
    if not bool(torch.isfinite(matrices).all()):
        raise ValueError(f"{where}: a product with a matrix that is not finite has no Lipschitz constant")
    return torch.linalg.matrix_norm(matrices, 2).max().item() * (1.0 + 1e-12) if matrices.numel() else 0.0
