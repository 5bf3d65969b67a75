"""Krylov steps for the leading singular vectors of an operator whose weight changes in training.

The operator keeps two vectors between its steps: the leading one, and a second one that stands by in case that its
singular value overtakes. Power iteration would gain on a change by the ratio of the two singular values in a step. Here
the vectors start a small subspace, a step of which adds the residual of the leading Ritz vector, and the two leading
Ritz vectors of the last subspace are what is kept: a Lanczos iteration with thick restarts (Wu and Simon 2000), except
that the residuals are those of the weights as they are now.

Where a weight stands still, or changes along its own singular vectors as under a penalty, the leading Ritz vector ends
as a singular vector, perhaps not the first one, and its residual as rounding. Then the second one's is added. Once that
is rounding as well, the second vector starts again from a fixed direction, so that what is orthogonal to the first is
searched over and over for a larger singular value.

On a CPU one operator comes after the other, whose weight then stays in the cache, and all that is small is computed by
NumPy, whose calls cost less than torch's. For a GPU see :mod:`fastlip.norms._solvers.krylov_steps_together`.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.applied_operator import applied_operator

#: A residual is rounding if it is shorter than this share of A^T A x, for the leading Ritz vector x.
SETTLED = {torch.float32: 1e-5, torch.float64: 1e-10}
#: Length below which a second vector, of length 1 or of one element's size, is what rounding left of it.
LOST = 1e-4
#: Most steps until the subspace is reduced to its two leading Ritz vectors.
MOST_STEPS = 8

_Array = npt.NDArray[np.float64]


class LeadingVectors(NamedTuple):
    """What the steps find.

    Attributes:
        vectors: the two leading right singular vectors, [2, Cin, *input_size], orthonormal; where there is no second
            singular value, the second one may be shorter. A fixed direction in place of the second one where both were
            singular vectors already. As they were given where the weight is 0 or not finite.
        image: the unit vector along the first one's image, [1, Cout, *output_size], or 0.
        norms: the lengths of the images of the first vector that was given and of the one that was found, [2]. The
            second is the operator's norm, approached from below.
    """

    vectors: Tensor
    image: Tensor
    norms: Tensor


def krylov_steps(
    op: Operator,
    vectors: Tensor,  # [2, Cin, *input_size]
    steps: int,
) -> LeadingVectors:
    """Take steps on a CPU.

    Args:
        op: operator with a weight in float32 or float64.
        vectors: the two vectors, in that dtype.
        steps: how many to take, each one application of A and one of A^T.
    """
    dtype = op.weight.dtype
    operator = applied_operator(op)
    rows = 2 + min(steps, MOST_STEPS)
    basis = torch.empty(rows, math.prod(op.input_shape), dtype=dtype)
    images = torch.empty(rows, math.prod(op.output_shape), dtype=dtype)
    basis[0] = _unit(operator.row(vectors[0]))
    basis[1] = _second(basis[0], operator.row(vectors[1]))
    for row in range(2):
        operator.forward(basis[row], images[row], 1.0)
    # Products of images are of the scaled operator, since their squares would leave the range of their dtype.
    before, other = (torch.linalg.vector_norm(row, dtype=torch.float64).item() for row in images[:2])
    size = max(before, other, torch.finfo(dtype).tiny)
    images[:2] *= 1.0 / size
    gram = np.stack([_products(images[:2], images[row]) for row in range(2)])
    count, settled = 2, False
    for _ in range(steps):
        if not np.isfinite(gram).all():
            break
        if count == rows:
            kept = _leading_eigenvectors(gram, 2)
            basis[:2], images[:2] = _combined(kept, basis), _combined(kept, images)
            gram, count = kept @ gram @ kept.T, 2
        least = math.sqrt(torch.finfo(dtype).tiny)
        for ritz in _leading_eigenvectors(gram, 2):
            back = operator.adjoint(_combined(ritz, images[:count]), 1.0 / size)
            least = max(least, SETTLED[dtype] * _length(back))
            residual = back.sub_(_combined(ritz @ gram @ ritz * ritz, basis[:count]))
            residual -= torch.mv(basis[:count].mT, torch.mv(basis[:count], residual))
            settled = _length(residual) <= least
            if not settled:
                break
        if settled:
            break
        residual = _unit(residual)
        # Where little was left, much of it was rounding errors.
        basis[count] = _unit(residual - torch.mv(basis[:count].mT, torch.mv(basis[:count], residual)))
        operator.forward(basis[count], images[count], 1.0 / size)
        products = _products(images[: count + 1], images[count])
        gram = np.block([[gram, products[:-1, None]], [products]])
        count += 1
    finite = math.isfinite(size) and bool(np.isfinite(gram).all())
    if not (finite and gram.any()):
        norms = op.weight.new_tensor([before, 0.0 if finite else math.nan])
        return LeadingVectors(vectors.clone(), torch.zeros(1, *op.output_shape, dtype=dtype), norms)
    kept = _leading_eigenvectors(gram, 2)
    image = _combined(kept[0], images[:count])
    length = _length(image)
    found = _combined(kept, basis[:count])
    if settled:
        found[1] = _second(found[0], torch.zeros_like(found[0]))
    return LeadingVectors(
        operator.vectors(found),
        operator.image(image.mul_(1.0 / length)),
        op.weight.new_tensor([before, length * size]),
    )


def _second(first: Tensor, second: Tensor) -> Tensor:
    """The unit vector along the part of the second one that is orthogonal to the first.

    Where nothing is left it is that of a fixed direction; for a single element, which has no other beside it, it is 0.
    """
    found = second - torch.dot(first, second) * first
    if not _length(found) > LOST:
        found = fixed_direction(len(first), first.dtype, first.device)
    for _ in range(2):
        found = found - torch.dot(first, found) * first
    return _unit(found) if _length(found) > LOST else torch.zeros_like(found)


def _leading_eigenvectors(matrix: _Array, count: int) -> _Array:
    """The first unit eigenvectors of a symmetric matrix, [count, n]."""
    found: _Array = np.linalg.eigh(matrix)[1][:, : -1 - count : -1].T
    return found


def _products(rows: Tensor, vector: Tensor) -> _Array:
    """Products of rows [m, total] with a vector [total], [m]."""
    found: _Array = torch.mv(rows, vector).double().numpy()
    return found


def _combined(coefficients: _Array, rows: Tensor) -> Tensor:
    """Sums of rows [m, total] with coefficients [m] or [k, m]."""
    factors = torch.from_numpy(np.ascontiguousarray(coefficients)).to(rows.dtype)
    return torch.mv(rows.mT, factors) if factors.dim() == 1 else torch.mm(factors, rows)


def _unit(vector: Tensor) -> Tensor:
    length = _length(vector)
    return vector * (1.0 / length if length > 0.0 else 0.0)


def _length(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector).item()


@lru_cache(maxsize=64)
def fixed_direction(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers without a pattern that an operator could share, [size], the same in each run."""
    return torch.sin(torch.arange(size, dtype=torch.float64, device=device).square() + 1.0).to(dtype)
