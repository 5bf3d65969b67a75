"""The steps of :mod:`fastlip.norms._solvers.krylov_steps` for many operators at once, as a GPU takes them.

The groups of a grouped convolution share nothing, so that what follows one of them never meets another's. Each is an
operator of its own here, and the largest norm is the convolution's.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.batched_operator import BatchedConvolutions, from_rows
from fastlip.norms._solvers.krylov_steps import LOST, MOST_STEPS, SETTLED, LeadingVectors
from fastlip.norms._solvers.start_vectors import fixed_direction

#: Rounds of three squarings for an eigenvector. Eigenvalues closer than 5e-5 of each other may stay mixed.
_ROUNDS = 4
#: Share of the trace below which what other eigenvectors leave of a matrix is rounding.
_NOTHING = 1e-13


def krylov_steps_together(ops: Sequence[Operator], vectors: Sequence[Tensor], steps: int) -> list[LeadingVectors]:
    """Take the same number of steps for all operators. Nothing is read on the host.

    Args:
        ops: operators with weights of one dtype, float32 or float64, on one device.
        vectors: two vectors for each, [2, Cin, *input_size], in that dtype.
        steps: how many to take, each one application of A and two of A^T.
    """
    dtype, device = ops[0].weight.dtype, ops[0].weight.device
    operators = BatchedConvolutions(ops, 1, dtype)
    domain = _Segments([(op.input_shape, op.groups) for op in ops], dtype, device)
    target = _Segments([(op.output_shape, op.groups) for op in ops], dtype, device)
    rows = 2 + min(steps, MOST_STEPS)
    basis = torch.zeros(rows, domain.total, dtype=dtype, device=device)
    images = torch.zeros(rows, target.total, dtype=dtype, device=device)
    for row in range(2):
        flat = torch.cat([_to_row(pair[row]) for pair in vectors])
        basis[row] = domain.unit(flat) if row == 0 else _second(domain, basis[:1], flat)
    given = basis[:2].clone()
    squares = [operators.forward(basis[row], images[row])[1] for row in range(2)]
    # Products of images are of the scaled operator, since their squares would leave the range of their dtype.
    square = torch.maximum(*squares).clamp_min(torch.finfo(dtype).tiny ** 2)
    counts, owner = _groups_of(tuple(op.groups for op in ops), device)
    images[:2] *= target.spread(_inverse(square.sqrt())[owner])
    before = torch.segment_reduce(target.lengths(images[0]), "max", lengths=counts, unsafe=True)
    gram = torch.stack([target.dots(images[:2], images[row]) for row in range(2)], 1)
    size = 2
    for _ in range(steps):
        if size == rows:
            kept = eigenvectors_by_squaring(gram, 2)
            basis[:2] = torch.stack([domain.combine(kept[:, row], basis) for row in range(2)])
            images[:2] = torch.stack([target.combine(kept[:, row], images) for row in range(2)])
            gram, size = kept @ gram @ kept.mT, 2
        residuals, remaining = list[Tensor](), list[Tensor]()
        least = torch.full_like(gram[:, 0, 0], torch.finfo(dtype).tiny ** 0.5)
        for ritz in eigenvectors_by_squaring(gram, 2).unbind(1):
            back, _ = operators.adjoint(target.combine(ritz, images[:size]), x_square=square)
            least = torch.maximum(least, SETTLED[dtype] * domain.lengths(back))
            value = torch.einsum("li,lij,lj->l", ritz, gram, ritz)
            residual = back - domain.combine(value[:, None] * ritz, basis[:size])
            residuals.append(residual - domain.combine(domain.dots(basis[:size], residual), basis[:size]))
            remaining.append(domain.lengths(residuals[-1]))
        settled = (remaining[0] <= least) & (remaining[1] <= least)
        of_first = domain.spread((remaining[0] > least).double()) > 0.0
        residual = torch.where(of_first, residuals[0], residuals[1])
        residual = domain.unit(residual * domain.spread((~settled).double()))
        # Where little was left, much of it was rounding errors.
        residual = domain.unit(residual - domain.combine(domain.dots(basis[:size], residual), basis[:size]))
        basis[size] = residual
        operators.forward(basis[size], images[size], x_square=square)
        size += 1
        products = target.dots(images[:size], images[size - 1])
        gram = torch.cat([torch.cat([gram, products[:, None, :-1]], 1), products[:, :, None]], 2)
    kept = eigenvectors_by_squaring(gram, 2)
    basis, images = basis[:size], images[:size]
    alive = domain.spread((gram[:, 0, 0] + gram[:, 1, 1]).ne(0.0).double()) > 0.0
    found = [torch.where(alive, domain.combine(kept[:, row], basis), given[row]) for row in range(2)]
    anew = _second(domain, found[0][None], torch.zeros_like(found[0]))
    found[1] = torch.where(domain.spread(settled.double()) > 0.0, anew, found[1])
    image = target.combine(kept[:, 0], images)
    lengths = target.lengths(image)
    # Each operator's norm is that of the first group with the largest one.
    norms = torch.segment_reduce(lengths, "max", lengths=counts, unsafe=True)
    places = torch.arange(len(lengths), dtype=torch.float64, device=device)
    largest = torch.where(lengths == norms[owner], places, math.inf)
    chosen = places == torch.segment_reduce(largest, "min", lengths=counts, unsafe=True)[owner]
    image = image * target.spread(torch.where(chosen, _inverse(lengths), 0.0))
    usable = (norms > 0.0) & norms.isfinite() & square.isfinite()
    norms = (torch.stack([before, norms], 1) * square.sqrt()[:, None]).to(dtype)
    result = []
    for place, (op, old) in enumerate(zip(ops, vectors, strict=True)):
        own = operators.domain[place]
        new = torch.stack([from_rows(row[None, own], op.input_shape)[0] for row in found])
        shown = from_rows(image[None, operators.range[place]], op.output_shape)
        new, shown = torch.where(usable[place], new, old), torch.where(usable[place], shown, 0.0)
        result.append(LeadingVectors(new, shown, norms[place].clone()))
    return result


def _second(domain: "_Segments", first: Tensor, second: Tensor) -> Tensor:
    """Unit vectors along the part of the second ones that is orthogonal to the first, [1, total].

    Where nothing is left they are those of a fixed direction, or 0 if a vector has one element.
    """
    found = second - domain.combine(domain.dots(first, second), first)
    lost = domain.lengths(found) < LOST
    found = torch.where(
        domain.spread(lost.double()) > 0.0, fixed_direction(domain.total, second.dtype, second.device), found
    )
    for _ in range(2):
        found = found - domain.combine(domain.dots(first, found), first)
    kept = domain.lengths(found) > LOST  # a vector of one element has no other beside it
    return domain.unit(found * domain.spread(kept.double()))


def eigenvectors_by_squaring(matrices: Tensor, count: int) -> Tensor:
    """The first unit eigenvectors of positive semidefinite matrices [b, n, n] float64, [b, count, n]; 0 for 0 or NaN.

    LAPACK's like would wait for the result. A power of the matrix over its trace is the projection onto the first
    eigenvector, or near multiple eigenvalues one onto their space, whose longest column is as good.
    """
    found: list[Tensor] = []
    rest, least = matrices, _NOTHING * _trace(matrices)
    for _ in range(count):
        power = rest
        for _ in range(_ROUNDS):
            power = power * _inverse(_trace(power))[:, None, None]
            power = torch.linalg.matrix_power(power, 8)
        diagonal, place = power.diagonal(dim1=1, dim2=2).max(1)
        column = power.gather(2, place[:, None, None].expand(-1, power.shape[1], 1))[:, :, 0]
        for other in found:  # what is left of it where nothing else is
            column = column - (column * other).sum(1, keepdim=True) * other
        vector = column * _inverse(torch.linalg.vector_norm(column, dim=1))[:, None]
        found.append(torch.where(((diagonal > 0.0) & (_trace(rest) > least))[:, None], vector, 0.0))
        keep = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
        keep = keep - found[-1][:, :, None] * found[-1][:, None, :]
        rest = keep @ rest @ keep
    return torch.stack(found, 1)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


class _Segments:
    """Flat vectors of the groups of several operators, and their products one by one."""

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], int]], dtype: torch.dtype, device: torch.device) -> None:
        """The vectors of operators [C, *size] with so many groups, which lie one after the other, [pixels, C] each."""
        self._dtype = dtype
        self._lengths, self._owners, self._order = _tables(tuple(parts), device)
        self.total = len(self._owners)

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Products of rows [m, total] with a vector [total], [groups, m] float64; the same in each run."""
        products = (rows * vector).mT
        products = products.contiguous() if self._order is None else products[self._order]
        return torch.segment_reduce(products, "sum", lengths=self._lengths, unsafe=True).double()

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Sums of rows [m, total] with coefficients [groups, m] float64."""
        factors = coefficients.to(self._dtype)
        return (factors.mT[:, self._owners] * rows).sum(0)

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers [groups] float64 as factors of all elements."""
        factors = numbers.to(self._dtype)
        return factors[self._owners]

    def lengths(self, vector: Tensor) -> Tensor:
        """Lengths of the groups' vectors, [groups] float64."""
        return self.dots(vector[None], vector)[:, 0].sqrt()

    def unit(self, vector: Tensor) -> Tensor:
        return vector * self.spread(_inverse(self.lengths(vector)))


@lru_cache(maxsize=64)
def _tables(
    parts: tuple[tuple[tuple[int, ...], int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The numbers of elements of groups, whose each element is, and the elements by groups; None for as they are."""
    owners, count = [], 0
    for (channels, *size), groups in parts:
        of_channel = torch.arange(groups).repeat_interleave(channels // groups) + count
        owners.append(of_channel.repeat(math.prod(size)))
        count += groups
    owner = torch.cat(owners)
    order = owner.argsort(stable=True).to(device) if any(groups > 1 for _, groups in parts) else None
    return torch.bincount(owner, minlength=count).to(device), owner.to(device), order


@lru_cache(maxsize=64)
def _groups_of(groups: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of groups of operators, and the operator of each group."""
    counts = torch.tensor(groups, device=device)
    return counts, torch.arange(len(groups), device=device).repeat_interleave(counts)


def _inverse(numbers: Tensor) -> Tensor:
    """1 over each number, and 0 for 0."""
    return torch.where(numbers > 0.0, 1.0 / numbers, 0.0)


def _to_row(vector: Tensor) -> Tensor:
    """A vector [C, *size] as operators take it, flat, [pixels, C]."""
    return vector.flatten(1).mT.reshape(-1) if vector.dim() > 1 else vector
