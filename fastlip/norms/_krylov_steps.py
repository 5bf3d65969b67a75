"""Krylov steps for the leading singular vectors of operators whose weights change in training.

Each operator keeps two vectors between its steps: the leading one, and a second one that stands by in case that its
singular value overtakes. Power iteration would gain on a change by the ratio of the two singular values in a step. Here
the vectors start a small subspace, a step of which adds the residual of the leading Ritz vector, and the two leading
Ritz vectors of the last subspace are what is kept: a Lanczos iteration with thick restarts (Wu and Simon 2000), except
that the residuals are those of the weights as they are now.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.batched_operator import BatchedConvolutions, from_rows

#: A residual shorter than this share of A^T A x is rounding, and extends nothing.
_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}
#: Length below which a second vector, of length 1 or of one element's size, is what rounding left of it.
_LOST = 1e-4
#: Most steps until the subspace is reduced to its two leading Ritz vectors.
_MOST_STEPS = 8
#: Rounds of three squarings in :func:`leading_eigenvectors`. Eigenvalues closer than 5e-5 of each other may stay mixed.
_ROUNDS = 4


class LeadingVectors(NamedTuple):
    """What the steps find for each operator.

    Attributes:
        vectors: the two leading right singular vectors, [2, Cin, *input_size] each, orthonormal; where there is no
            second singular value, the second one may be shorter. As they were given where the weight is 0 or not
            finite.
        images: the unit vectors along the first one's images, [1, Cout, *output_size] each, or 0.
        before: the lengths of the images of the first vectors that were given, [operators].
        norms: those of the vectors that were found, [operators]: the operators' norms, approached from below.
    """

    vectors: list[Tensor]
    images: list[Tensor]
    before: Tensor
    norms: Tensor


def krylov_steps(ops: Sequence[Operator], vectors: Sequence[Tensor], steps: int) -> LeadingVectors:
    """Take steps for all operators at once. On a GPU nothing is read on the host.

    Args:
        ops: operators with weights of one dtype, float32 or float64, on one device.
        vectors: two vectors for each, [2, Cin, *input_size], in that dtype.
        steps: how many to take, each one application of A and one of A^T.
    """
    dtype, device = ops[0].weight.dtype, ops[0].weight.device
    operators = BatchedConvolutions(ops, 1, dtype)
    domain, target = (_Segments(side, dtype, device) for side in (operators.domain, operators.range))
    rows = 2 + min(steps, _MOST_STEPS)
    basis = torch.zeros(rows, domain.total, dtype=dtype, device=device)
    images = torch.zeros(rows, target.total, dtype=dtype, device=device)
    for row in range(2):
        flat = domain.cat([_to_row(pair[row]) for pair in vectors])
        basis[row] = domain.unit(flat if row == 0 else _second(domain, basis[:1], flat))
    squares = [operators.forward(basis[row], images[row])[1] for row in range(2)]
    # Products of images are of the scaled operator, since their squares would leave the range of their dtype.
    square = torch.maximum(*squares).clamp_min(torch.finfo(dtype).tiny ** 2)
    images[:2] *= target.spread(_inverse(square.sqrt()))
    gram = torch.stack([target.dots(images[:2], images[row]) for row in range(2)], 1)
    size = 2
    for _ in range(steps):
        if size == rows:
            kept = leading_eigenvectors(gram, 2)
            basis[:2] = torch.stack([domain.combine(kept[:, row], basis) for row in range(2)])
            images[:2] = torch.stack([target.combine(kept[:, row], images) for row in range(2)])
            gram, size = kept @ gram @ kept.mT, 2
        leading = leading_eigenvectors(gram, 1)[:, 0]
        value = torch.einsum("li,lij,lj->l", leading, gram, leading)
        back, back_square = operators.adjoint(target.combine(leading, images[:size]), x_square=square)
        residual = back - domain.combine(value[:, None] * leading, basis[:size])
        for _ in range(2):  # the first time leaves rounding errors of the size of what it removes
            residual = residual - domain.combine(domain.dots(basis[:size], residual), basis[:size])
        length = domain.dots(residual[None], residual)[:, 0].sqrt()
        enough = (length > _ROUNDING[dtype] * back_square.sqrt()) & (length > math.sqrt(torch.finfo(dtype).tiny))
        basis[size] = residual * domain.spread(torch.where(enough, _inverse(length), 0.0))
        operators.forward(basis[size], images[size], x_square=square)
        size += 1
        products = target.dots(images[:size], images[size - 1])
        gram = torch.cat([torch.cat([gram, products[:, None, :-1]], 1), products[:, :, None]], 2)
    kept = leading_eigenvectors(gram, 2)
    basis, images = basis[:size], images[:size]
    found = [domain.combine(kept[:, row], basis) for row in range(2)]
    image = target.combine(kept[:, 0], images)
    lengths = target.dots(image[None], image)[:, 0].sqrt()
    image = image * target.spread(_inverse(lengths))
    usable = (lengths > 0.0) & lengths.isfinite() & square.isfinite()
    news, units = [], []
    for place, (op, old) in enumerate(zip(ops, vectors, strict=True)):
        own = operators.domain[place]
        new = torch.stack([from_rows(row[None, own], op.input_shape)[0] for row in found])
        news.append(torch.where(usable[place], new, old))
        shown = from_rows(image[None, operators.range[place]], op.output_shape)
        units.append(torch.where(usable[place], shown, 0.0))
    return LeadingVectors(news, units, squares[0].sqrt().to(dtype), (lengths * square.sqrt()).to(dtype))


def _second(domain: "_Segments", first: Tensor, second: Tensor) -> Tensor:
    """The part of second vectors that is orthogonal to the first, [1, total]; where there is none, of a fixed one."""
    found = second - domain.combine(domain.dots(first, second), first)
    lost = domain.dots(found[None], found)[:, 0] < _LOST**2
    found = torch.where(
        domain.spread(lost.double()) > 0.0, _fixed_direction(domain.total, second.dtype, second.device), found
    )
    for _ in range(2):
        found = found - domain.combine(domain.dots(first, found), first)
    kept = domain.dots(found[None], found)[:, 0] > _LOST**2  # a vector of one element has no other beside it
    return found * domain.spread(kept.double())


def leading_eigenvectors(matrices: Tensor, count: int) -> Tensor:
    """The first unit eigenvectors of positive semidefinite matrices [b, n, n] float64, [b, count, n].

    They are 0 for 0, and for matrices that are not finite. On a GPU, where LAPACK's like would wait for the result,
    they come from repeated squaring.
    """
    if matrices.device.type == "cpu":
        usable = matrices.flatten(1).isfinite().all(1) & matrices.flatten(1).any(1)
        vectors = torch.linalg.eigh(torch.where(usable[:, None, None], matrices, 0.0))[1]
        return torch.where(usable[:, None, None], vectors.mT.flip(1)[:, :count], 0.0)
    return eigenvectors_by_squaring(matrices, count)


def eigenvectors_by_squaring(matrices: Tensor, count: int) -> Tensor:
    """:func:`leading_eigenvectors` without a wait for the device.

    A power of the matrix over its trace is the projection onto the first eigenvector, or near multiple eigenvalues one
    onto their space, whose longest column is as good.
    """
    found: list[Tensor] = []
    rest = matrices
    for _ in range(count):
        power = rest
        for _ in range(_ROUNDS):
            power = power * _inverse(power.diagonal(dim1=1, dim2=2).sum(1))[:, None, None]
            power = torch.linalg.matrix_power(power, 8)
        diagonal, place = power.diagonal(dim1=1, dim2=2).max(1)
        column = power.gather(2, place[:, None, None].expand(-1, power.shape[1], 1))[:, :, 0]
        for other in found:  # what is left of it where nothing else is
            column = column - (column * other).sum(1, keepdim=True) * other
        vector = column * _inverse(torch.linalg.vector_norm(column, dim=1))[:, None]
        found.append(torch.where((diagonal > 0.0)[:, None], vector, 0.0))
        keep = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
        keep = keep - found[-1][:, :, None] * found[-1][:, None, :]
        rest = keep @ rest @ keep
    return torch.stack(found, 1)


class _Segments:
    """Flat vectors of several operators, one after the other, and their products one by one."""

    def __init__(self, places: Sequence[slice], dtype: torch.dtype, device: torch.device) -> None:
        self.total, self._dtype = places[-1].stop, dtype
        self._lengths: Tensor | None = None
        if len(places) > 1:
            self._lengths, self._owners = _tables(tuple(place.stop - place.start for place in places), device)

    def cat(self, vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Products of rows [m, total] with a vector [total], [operators, m] float64; the same in each run."""
        if self._lengths is None:
            return torch.mv(rows, vector).double()[None]
        products = (rows * vector).mT.contiguous()
        return torch.segment_reduce(products, "sum", lengths=self._lengths, unsafe=True).double()

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Sums of rows [m, total] with coefficients [operators, m] float64."""
        factors = coefficients.to(self._dtype)
        if self._lengths is None:
            return torch.mv(rows.mT, factors[0])
        return (factors.mT[:, self._owners] * rows).sum(0)

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers [operators] float64 as factors of all elements."""
        factors = numbers.to(self._dtype)
        return factors if self._lengths is None else factors[self._owners]

    def unit(self, vector: Tensor) -> Tensor:
        return vector * self.spread(_inverse(self.dots(vector[None], vector)[:, 0].sqrt()))


@lru_cache(maxsize=64)
def _tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The lengths of segments, and which one each element is in."""
    lengths = torch.tensor(sizes, device=device)
    return lengths, torch.arange(len(sizes), device=device).repeat_interleave(lengths)


@lru_cache(maxsize=64)
def _fixed_direction(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers without a pattern that an operator could share, [size], the same in each run."""
    return torch.sin(torch.arange(size, dtype=torch.float64, device=device).square() + 1.0).to(dtype)


def _to_row(vector: Tensor) -> Tensor:
    """A vector [C, *size] as operators take it, flat, [pixels, C]."""
    return vector.flatten(1).mT.reshape(-1) if vector.dim() > 1 else vector


def _inverse(numbers: Tensor) -> Tensor:
    """1 over each number, and 0 for 0."""
    return torch.where(numbers > 0.0, 1.0 / numbers, 0.0)
