"""A-posteriori bounds after the last step: lower sides on explicit vectors, upper sides with the measured rounding.

All of it is evaluated in float64, whatever arithmetic the iteration ran in.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlip.norms._operators.composed import AnyOperator, weight_numel
from fastlip.norms._solvers.batched_operator import batched_operator, from_rows
from fastlip.norms._solvers.certificate import Array, krylov_bound
from fastlip.norms._solvers.combinations import combine, runs_of
from fastlip.norms._solvers.float64_rounding import RoundingTerms, rounding_terms
from fastlip.norms._solvers.iteration_config import Indices, IterationConfig, IterationResult, device_limits
from fastlip.norms._solvers.recurrence import Recurrence
from fastlip.norms._solvers.sketches import Sketches
from fastlip.norms._solvers.tridiagonal import Columns, decompose


class _Part(NamedTuple):
    """Neighbours in the recurrence whose bounds are computed at once."""

    first: int
    ops: Sequence[AnyOperator]
    runs: list[slice]  # operators of one size each
    counts: Indices  # number of vectors of each operator
    columns: Columns
    rounding: RoundingTerms


class _PartBounds(NamedTuple):
    """Lower sides, upper bounds on the largest ||F z||, and the vectors that attain the lower sides, if kept."""

    lower: Array
    residual: Array
    vectors: list[Tensor | None]


def a_posteriori_bounds(
    ops: Sequence[AnyOperator],
    sizes: Indices,
    run: Recurrence,
    steps: Indices,
    overlaps: Array,
    config: IterationConfig,
    sketches: Sketches,
) -> list[IterationResult]:
    """Intervals of operators on R^size after ``steps`` steps each, from start vectors of at least these overlaps.

    ``sizes``, ``steps`` and ``overlaps`` are [operators].
    """
    b, counts, rounding = config.starts, steps + 1, rounding_terms(ops, sizes)
    groups, columns = decompose(*run.coefficients(int(steps.max())), steps, b)
    begins = [0, *counts.cumsum().tolist()]
    found = []
    for at in _parts(ops, sizes, sketches.amount + 1, run.device):
        runs = runs_of(sizes[at].tolist(), b, run.device)
        own = Columns(*(array[begins[at.start] : begins[at.stop]] for array in columns))
        part = _Part(at.start, ops[at], runs, counts[at], own, RoundingTerms(*(term[at] for term in rounding)))
        found.append(_bound_part(part, run, config, sketches.amount))
    last, residuals = 1.0 + rounding.quotient, np.concatenate([part.residual for part in found]) / sketches.scale
    uppers = np.zeros(len(ops))
    for group in groups:
        i = group.operators
        numbers = [array[i].repeat(b) for array in (last, residuals, overlaps)]
        bounds = krylov_bound(group.diagonal, group.off, numbers[0], numbers[1], numbers[2])
        uppers[i] = bounds.reshape(-1, b).max(axis=1)
    lowers = [lower for part in found for lower in part.lower.tolist()]
    vectors = [vector for part in found for vector in part.vectors]
    return [
        IterationResult(*interval) for interval in zip(lowers, uppers.tolist(), steps.tolist(), vectors, strict=True)
    ]


def _parts(ops: Sequence[AnyOperator], sizes: Indices, vectors: int, device: torch.device) -> Iterator[slice]:
    """Neighbours whose bounds are computed together, within a working set."""
    begin = used = 0
    most = device_limits(device).working_set
    for i, (op, size) in enumerate(zip(ops, sizes.tolist(), strict=True)):
        needed = 8 * (4 * vectors * size + 2 * weight_numel(op))
        if i > begin and used + needed > most:
            yield slice(begin, i)
            begin, used = i, 0
        used += needed
    yield slice(begin, len(ops))


def _bound_part(part: _Part, run: Recurrence, config: IterationConfig, amount: int) -> _PartBounds:
    """Bound operators' norms and their F from below and above, by applying them to combinations of their vectors."""
    ops, runs, counts, (errors, slack, bound) = part.ops, part.runs, part.counts, part.rounding
    # Rounding the weights to the iteration's arithmetic is part of F, since these operators have the exact weights.
    exact = batched_operator(ops, amount + 1, torch.float64)
    coefficients, sizes = _coefficients(counts, part.columns, amount, config.generator, run.device)
    flat = coefficients.new_empty(exact.domain[-1].stop)
    places = [slice(exact.domain[own.start].start, exact.domain[own.stop - 1].stop) for own in runs]
    sums, lengths, norms = [], [], []
    for place, total in zip(places, combine(run, part.first, runs, counts, coefficients), strict=True):
        sums.append(total)
        flat[place].view(len(total), amount + 1, -1).copy_(total[:, : amount + 1])
        lengths.append(torch.linalg.vector_norm(total[:, amount], dim=1))
    images, squares = exact.forward(flat)
    back, _ = exact.adjoint(images, out=flat)
    for place, total in zip(places, sums, strict=True):
        missed = back[place].view(len(total), amount + 1, -1)[:, :-1].sub_(total[:, amount + 1 :])
        norms.append(torch.linalg.vector_norm(missed, dim=2).amax(1))
    numbers = torch.cat([*lengths, squares[amount :: amount + 1], *norms, sizes])
    length, square, norm, size = numbers.view(4, -1).cpu().numpy()
    stretch = np.divide(np.sqrt(square), length, out=np.zeros_like(length), where=length > 0.0)
    lower = np.where(length > 0.0, stretch * (1.0 - errors) - slack, 0.0)
    # Evaluating F z in float64 rounds too: the two applications, and the sums that form V z and V T z.
    summands = (counts - 1) * config.starts
    evaluation = size * (2.1 * slack * bound + 1e-15 * (summands + 8) * bound**2)
    vectors: list[Tensor | None] = [None] * len(ops)
    if config.keep_vectors:
        rows = (row for total in sums for row in total[:, amount : amount + 1])
        vectors = [from_rows(row, op.input_shape)[0] for row, op in zip(rows, ops, strict=True)]
    return _PartBounds(np.maximum(lower, 0.0), norm * (1.0 + errors) + evaluation, vectors)


def _coefficients(
    counts: Indices, columns: Columns, amount: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Coefficients of the operators' vectors, [2 amount + 1, vectors + 1, b], and each operator's largest sum of |z|.

    They form V z for each Gaussian z, the Ritz vector, and V T z + b_k v_{k+1} z_k for each z. Behind those of all
    vectors there is a 0.
    """
    diagonal, off, top, inverse = torch.from_numpy(np.stack(columns)).to(device, non_blocking=True)
    rows = (counts.cumsum() - counts)[:, None] + np.minimum(np.arange(counts.max()), counts[:, None] - 1)
    own = torch.from_numpy(rows).to(device, non_blocking=True)
    z = torch.randn(amount, *top.shape, dtype=torch.float64, generator=generator, device=generator.device).to(device)
    # An operator's last vector has neither z nor a row of T, so that neighbours do not mix below.
    z.index_fill_(1, own[:, -1], 0.0)
    coefficients = z.new_zeros(2 * amount + 1, len(top) + 1, top.shape[1])
    inner, expected = coefficients[:amount, :-1], coefficients[amount + 1 :, :-1]
    inner.copy_(z)
    coefficients[amount, :-1] = top
    torch.mul(diagonal, z, out=expected)
    expected[:, 1:].addcmul_(off[:-1], z[:, :-1])
    expected[:, :-1].addcmul_(off[:-1], z[:, 1:])
    coefficients[:, :-1] *= inverse
    return coefficients, z.abs().sum(2)[:, own].sum(2).amax(0)
