"""Linear combinations of Krylov vectors in float64, for many operators in few launches.

Neighbours of one size are combined together, a block of steps at a time, whatever number of steps each of them took.
Memory beyond an operator's own vectors is undefined, and may hold values that are not finite: it is overwritten before
it is multiplied by its coefficients, which are 0.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlip.norms._solvers.iteration_config import Indices, device_limits
from fastlip.norms._solvers.recurrence import BLOCK, Recurrence

#: Up to this ratio it is cheaper to include operators that have ended in between than to gather those that have not.
_SPARE = 1.4


class _Span(NamedTuple):
    """A block of steps of a run of operators, on the host."""

    members: slice | Indices  # operators that have vectors in it, counted from the run's first
    rows: Indices  # places of their coefficients, [members, columns]
    ended: list[Indices]  # members and columns of undefined vectors; empty if there are none


class _Block(NamedTuple):
    """A span on the device, with its coefficients."""

    members: slice | Tensor
    factors: Tensor  # [members, r, columns * starts]
    ended: list[Tensor]


def runs_of(sizes: Sequence[int], starts: int, device: torch.device) -> list[slice]:
    """Runs of neighbours of one size that are combined together."""
    runs, at = [], 0
    for size, same in groupby(sizes):
        end = at + len(list(same))
        most = max(1, device_limits(device).elements // (BLOCK * starts * size))
        runs += [slice(i, min(i + most, end)) for i in range(at, end, most)]
        at = end
    return runs


def combine(
    run: Recurrence, first: int, runs: Sequence[slice], counts: Indices, coefficients: Tensor
) -> Iterator[Tensor]:
    """Sums over each operator's own vectors, [operators, r, N] for each run.

    Args:
        run: the recurrence that the vectors belong to.
        first: the operator of the recurrence from which ``runs`` count.
        runs: operators of one size each, from :func:`runs_of`.
        counts: number of vectors of each operator.
        coefficients: those of the vectors of one operator after the other, and a 0: [r, sum of counts + 1, starts].
    """
    amount, most = len(coefficients), device_limits(coefficients.device).elements
    wide = part = coefficients.new_empty(0)
    zero = coefficients.new_zeros(())
    for own, blocks in zip(runs, _blocks(runs, counts, coefficients), strict=True):
        basis = run.basis(slice(first + own.start, first + own.stop), int(counts[own].max()))
        size, largest = basis[0].shape[3], max(b.factors.shape[0] * b.factors.shape[2] for b in blocks)
        width = min(size, max(1, most // largest))
        wide = _room(wide, largest * width)
        total = coefficients.new_empty(own.stop - own.start, amount, size)
        if width == size:
            _sum(basis, blocks, wide, total, zero)
        else:  # one operator
            part = _room(part, amount * width)
            for at in range(0, size, width):
                elements = slice(at, min(at + width, size))
                piece = part[: amount * (elements.stop - at)].view(1, amount, -1)
                _sum([vectors[..., elements] for vectors in basis], blocks, wide, piece, zero)
                total[..., elements] = piece
        yield total


def _room(memory: Tensor, numel: int) -> Tensor:
    return memory if memory.numel() >= numel else memory.new_empty(numel)


def _sum(basis: Sequence[Tensor], blocks: Sequence[_Block], memory: Tensor, total: Tensor, zero: Tensor) -> None:
    """Sums of vectors [columns, operators, starts, N] of each block, into ``total``, [operators, r, N]."""
    for i, (vectors, block) in enumerate(zip(basis, blocks, strict=True)):
        own = vectors[:, block.members].transpose(0, 1)
        wide = memory[: own.numel()].view(own.shape).copy_(own)
        if block.ended:
            wide.index_put_(tuple(block.ended), zero)
        wide = wide.flatten(1, 2)
        if i == 0:  # all operators have vectors in the first block
            torch.bmm(block.factors, wide, out=total)
        elif isinstance(block.members, slice):
            total[block.members].baddbmm_(block.factors, wide)
        else:
            total.index_add_(0, block.members, torch.bmm(block.factors, wide))


def _blocks(runs: Sequence[slice], counts: Indices, coefficients: Tensor) -> list[list[_Block]]:
    """The blocks of steps of each run; all indices go to the device in one copy, and all coefficients in one gather."""
    nowhere = coefficients.shape[1] - 1
    columns = np.arange(counts.max())
    rows = np.where(columns < counts[:, None], (counts.cumsum() - counts)[:, None] + columns, nowhere)
    spans = [_spans(rows[own], counts[own], nowhere) for own in runs]
    every = [span for own in spans for span in own]
    hosted = [span.rows.ravel() for span in every]
    for span in every:
        hosted += [] if isinstance(span.members, slice) else [span.members]
        hosted += span.ended
    flat = torch.from_numpy(np.concatenate(hosted)).to(coefficients.device, non_blocking=True)
    taken = sum(span.rows.size for span in every)
    places = iter(flat[taken:].split([len(a) for a in hosted[len(every) :]]))
    factors = iter(coefficients.index_select(1, flat[:taken]).split([span.rows.size for span in every], dim=1))

    def placed(span: _Span) -> _Block:
        members = span.members if isinstance(span.members, slice) else next(places)
        own = next(factors).unflatten(1, span.rows.shape).flatten(2).transpose(0, 1)
        return _Block(members, own, [next(places) for _ in span.ended])

    return [[placed(span) for span in own] for own in spans]


def _spans(rows: Indices, counts: Indices, nowhere: int) -> list[_Span]:
    """The blocks of steps of a run of operators with ``counts`` vectors; ``rows`` is [operators, columns]."""
    least, most = int(counts.min()), int(counts.max())
    spans = []
    for at in range(0, most, BLOCK):
        members: slice | Indices = slice(0, len(counts))
        end = min(at + BLOCK, most)
        if at >= least:
            on = np.flatnonzero(counts > at)
            together = slice(int(on[0]), int(on[-1]) + 1)
            members = together if together.stop - together.start <= _SPARE * len(on) else on
        own = rows[members, at:end]
        spans.append(_Span(members, own, [] if end <= least else list(np.nonzero(own == nowhere))))
    return spans
