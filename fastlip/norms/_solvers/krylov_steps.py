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

The groups of a grouped convolution share nothing, so that what follows one of them would never meet another's. Each is
followed by two vectors of its own, and the largest norm is the operator's. More vectors may be given to choose from,
and a matrix of few rows or columns is decomposed at once.

On a CPU one operator comes after the other, whose weight then stays in the cache, and all that is small is computed by
NumPy, whose calls cost less than torch's. For a GPU, and for grouped convolutions, see
:mod:`fastlip.norms._solvers.krylov_steps_together`.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.applied_operator import AppliedOperator, applied_operator
from fastlip.norms._solvers.start_vectors import fixed_direction

#: A residual is rounding if it is shorter than this share of A^T A x, for the leading Ritz vector x.
SETTLED = {torch.float32: 1e-5, torch.float64: 1e-10}
#: Length below which a second vector, of length 1 or of one element's size, is what rounding left of it.
LOST = 1e-4
#: Growth of a convolution's norm in a step, relative, after which no more are taken than must be.
_ENOUGH = 1e-4
#: Rows or columns of a matrix up to which its Gram matrix takes less time than steps.
_NARROW = 32
#: Most steps until the subspace is reduced to its two leading Ritz vectors.
MOST_STEPS = 8

_Array = npt.NDArray[np.float64]


class LeadingVectors(NamedTuple):
    """What the steps find.

    Attributes:
        vectors: for each group the two leading right singular vectors, together [2, Cin, *input_size]. They are
            orthonormal; where there is no second singular value, the second one may be shorter, and where both were
            singular vectors already, a fixed direction is in its place. As they were given where the weight is 0 or not
            finite.
        image: the unit vector along the image of the first one of the group whose norm is the largest, and 0 in others,
            [1, Cout, *output_size]; or 0.
        norms: the largest length of an image of the first vectors that were given, and of those that were found, [2].
            The second is the operator's norm, approached from below.
    """

    vectors: Tensor
    image: Tensor
    norms: Tensor


def krylov_steps(op: Operator, vectors: Tensor, steps: int, most_steps: int | None = None) -> LeadingVectors:
    """Take steps on a CPU.

    Args:
        op: operator with a weight in float32 or float64.
        vectors: the two vectors, in that dtype, and more to choose from, if any; [at least 2, Cin, *input_size].
        steps: how many to take at least, each one application of A and one or two of A^T.
        most_steps: how many to take at most, of a convolution while the norm grows; if None ``steps``.
    """
    if not op.kernel and op.groups == 1 and min(op.weight.shape) <= _NARROW:
        return _of_narrow_matrix(op, vectors)
    dtype, most_steps = op.weight.dtype, steps if most_steps is None else most_steps
    operator = applied_operator(op)
    count = len(vectors)
    rows = count + min(most_steps, MOST_STEPS)
    basis = torch.empty(rows, op.groups, math.prod(op.input_shape) // op.groups, dtype=dtype)
    images = torch.empty(rows, op.groups, math.prod(op.output_shape) // op.groups, dtype=dtype)
    basis[0] = _unit(operator.row(vectors[0]))
    basis[1] = _second(basis[0], operator.row(vectors[1]))
    for place in range(2, count):
        given = _unit(operator.row(vectors[place]))
        basis[place] = _unit(_orthogonal(_unit(_orthogonal(given, basis[:place])), basis[:place]))
    operator.forward(basis[:count], images[:count], 1.0)
    # Products of images are of the scaled operator, since their squares would leave the range of their dtype.
    lengths = torch.linalg.vector_norm(images[:count], dim=2, dtype=torch.float64).amax(1)
    before, size = lengths[0].item(), max(lengths.max().item(), torch.finfo(dtype).tiny)
    images[:count] *= 1.0 / size
    gram = np.stack([_products(images[:count], images[row]) for row in range(count)], 1)
    if not gram.any():
        return _nothing_found(op, vectors, before, 0.0 if math.isfinite(size) else math.nan)
    if op.groups > 1:  # groups of zeros keep what they were given
        gram[~gram.any((1, 2))] = np.diag([2e-300, 1e-300, *[0.0] * (count - 2)])
    settled = np.zeros(op.groups, bool)
    squares: _Array = np.zeros(op.groups)
    for taken in range(most_steps):
        if not np.isfinite(gram).all():
            break
        last, squares = squares, _squares(gram)
        if taken >= steps and op.kernel and (squares - last <= 2.0 * _ENOUGH * squares).all():
            break
        if count == rows:
            kept = _leading_eigenvectors(gram, 2)
            basis[:2], images[:2] = _combined(kept, basis[:count]), _combined(kept, images[:count])
            gram, count = kept @ gram @ kept.swapaxes(1, 2), 2
        basis[count], settled = _expansion(operator, gram, basis[:count], images[:count], 1.0 / size)
        if settled.all():
            break
        operator.forward(basis[count : count + 1], images[count : count + 1], 1.0 / size)
        products = _products(images[: count + 1], images[count])
        gram = np.concatenate([np.concatenate([gram, products[:, :-1, None]], 2), products[:, None]], 1)
        count += 1
    if not (math.isfinite(size) and np.isfinite(gram).all()):
        return _nothing_found(op, vectors, before, math.nan)
    kept = _leading_eigenvectors(gram, 2)
    found, image = _combined(kept, basis[:count]), _combined(kept[:, :1], images[:count])[0]
    if settled.any():
        anew = _second(found[0], torch.zeros_like(found[0]))
        found[1] = torch.where(torch.from_numpy(settled)[:, None], anew, found[1])
    lengths = _lengths(image)
    largest = int(lengths.argmax())
    shown = torch.zeros_like(image)
    torch.mul(image[largest], 1.0 / lengths[largest], out=shown[largest])
    norms = op.weight.new_tensor([before, lengths[largest] * size])
    return LeadingVectors(operator.vectors(found), operator.image(shown), norms)


def _of_narrow_matrix(op: Operator, vectors: Tensor) -> LeadingVectors:
    """The leading singular vectors of a matrix of few rows or columns, by its Gram matrix."""
    start = _unit(vectors[:1])
    before = torch.linalg.vector_norm(torch.mv(op.weight, start[0]), dtype=torch.float64).item()
    largest = torch.linalg.vector_norm(op.weight, math.inf).item()
    if not 0.0 < largest < math.inf:
        return _nothing_found(op, vectors, before, 0.0 if largest == 0.0 else math.nan)
    weight = op.weight.double() / largest
    wide = len(weight) <= weight.shape[1]
    gram = weight @ weight.mT if wide else weight.mT @ weight
    kept = torch.from_numpy(_leading_eigenvectors(gram.numpy()[None], min(2, len(gram)))[0].copy())
    found = kept @ weight if wide else kept
    first = _unit(found[:1])
    second = _second(first, found[1:2] if len(found) > 1 else torch.zeros_like(first))
    image = torch.mv(weight, first[0])
    length = torch.linalg.vector_norm(image)
    norms = op.weight.new_tensor([before, length.item() * largest])
    return LeadingVectors(
        torch.cat([first, second]).to(op.weight.dtype), (image / length)[None].to(op.weight.dtype), norms
    )


def _nothing_found(op: Operator, vectors: Tensor, before: float, norm: float) -> LeadingVectors:
    """Where the weight is 0 or not finite."""
    image = torch.zeros(1, *op.output_shape, dtype=op.weight.dtype)
    return LeadingVectors(vectors[:2].clone(), image, op.weight.new_tensor([before, norm]))


def _expansion(
    operator: AppliedOperator, gram: _Array, basis: Tensor, images: Tensor, scale: float
) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """The vector to add to a basis [m, groups, n] with images under scale times the operator, and ``gram`` of these.

    Returns:
        In each group the unit vector along the residual of the leading Ritz vector, or of the second one where that is
        rounding; and whether both are, [groups], so that the vector is 0.
    """
    limits = torch.finfo(basis.dtype)

    def residual(ritz: _Array) -> tuple[Tensor, _Array]:
        """It, and the length below which it is rounding."""
        back = operator.adjoint(_combined(ritz[:, None], images)[0], scale)
        return _orthogonal(back, basis), np.maximum(SETTLED[basis.dtype] * _lengths(back), math.sqrt(limits.tiny))

    leading, second = _leading_eigenvectors(gram, 2).swapaxes(0, 1)
    found, least = residual(leading)
    settled = _lengths(found) <= least
    if settled.any():
        other, of_other = residual(second)
        found = torch.where(torch.from_numpy(settled)[:, None], other, found)
        settled &= _lengths(other) <= np.maximum(least, of_other)
        found *= torch.from_numpy(~settled)[:, None]
    # Where little was left, much of it was rounding errors.
    return _unit(_orthogonal(_unit(found), basis)), settled


def _second(first: Tensor, second: Tensor) -> Tensor:
    """The unit vectors along the part of the second ones that is orthogonal to the first, [groups, n].

    Where nothing is left it is that of a fixed direction; for a single element, which has no other beside it, it is 0.
    """
    found = _orthogonal(second, first[None])
    lost = ~(_lengths(found) > LOST)
    if not lost.any():
        return _unit(_orthogonal(found, first[None]))
    direction = fixed_direction(first.shape[1], first.dtype, first.device)
    found = torch.where(torch.from_numpy(lost)[:, None], direction, found)
    for _ in range(2):
        found = _orthogonal(found, first[None])
    return torch.where(torch.from_numpy(_lengths(found) > LOST)[:, None], _unit(found), 0.0)


def _leading_eigenvectors(matrices: _Array, count: int) -> _Array:
    """The first unit eigenvectors of symmetric matrices [groups, n, n], [groups, count, n]."""
    found: _Array = np.linalg.eigh(matrices)[1][:, :, : -1 - count : -1].swapaxes(1, 2)
    return found


def _squares(matrices: _Array) -> _Array:
    """The largest eigenvalues of symmetric matrices [groups, n, n], [groups]."""
    found: _Array = np.linalg.eigvalsh(matrices)[:, -1].astype(np.float64)
    return found


def _products(rows: Tensor, vector: Tensor) -> _Array:
    """Products of rows [m, groups, n] with a vector [groups, n], [groups, m]."""
    if vector.size(0) == 1:  # in less time
        found: _Array = torch.mv(rows[:, 0], vector[0])[None].double().numpy()
    else:
        found = torch.bmm(rows.transpose(0, 1), vector[:, :, None])[:, :, 0].double().numpy()
    return found


def _combined(coefficients: _Array, rows: Tensor) -> Tensor:
    """Sums of rows [m, groups, n] with coefficients [groups, k, m], [k, groups, n]."""
    factors = torch.from_numpy(np.ascontiguousarray(coefficients)).to(rows.dtype)
    if factors.size(0) == 1:
        return torch.mm(factors[0], rows[:, 0])[:, None]
    return torch.bmm(factors, rows.transpose(0, 1)).transpose(0, 1)


def _orthogonal(vector: Tensor, rows: Tensor) -> Tensor:
    """The part of a vector [groups, n] that is orthogonal to orthonormal rows [m, groups, n]."""
    if vector.size(0) == 1:
        return torch.addmv(vector[0], rows[:, 0].mT, torch.mv(rows[:, 0], vector[0]), alpha=-1.0)[None]
    by_group = rows.transpose(0, 1)
    return torch.baddbmm(vector[:, :, None], by_group.mT, torch.bmm(by_group, vector[:, :, None]), alpha=-1.0)[:, :, 0]


def _unit(vector: Tensor) -> Tensor:
    if vector.size(0) == 1:
        length = torch.linalg.vector_norm(vector).item()
        return vector * (1.0 / length if length > 0.0 else 0.0)
    lengths = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return vector * torch.where(lengths > 0.0, 1.0 / lengths, 0.0)


def _lengths(vector: Tensor) -> _Array:
    """Lengths of the rows of a vector [groups, n], [groups]."""
    found: _Array = torch.linalg.vector_norm(vector, dim=1).double().numpy()
    return found
