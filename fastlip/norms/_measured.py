"""After the last step: lower sides on explicit vectors, upper sides with the rounding that was measured, in float64."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlip.norms._certificate import Array, krylov_bound, normal_equations, top_pairs
from fastlip.norms._composed import AnyOperator, forward_error, magnitude, weight_numel
from fastlip.norms._iterate import Iterate, Plan, norm_error
from fastlip.norms._recurrence import Recurrence
from fastlip.norms._stack import from_rows, stack

#: Elements of each vector that are brought to float64 and summed at a time on a CPU: they stay in cache.
_WIDTH = 2048
#: Elements of all vectors that are brought to float64 at a time on a GPU.
_AT_ONCE = 1 << 25
#: Bytes that operators measured together may take on a CPU: memory that is used again costs no page faults.
_WORKING_SET = 1 << 24


@dataclass(frozen=True)
class Sketches:
    """Gaussian vectors to measure ||F|| with.

    Attributes:
        amount: of them.
        scale: ||F|| <= max ||F z|| / scale fails with the probability set aside for it.
    """

    amount: int
    scale: float


@dataclass(frozen=True)
class _Chains:
    """One operator's recurrence: its T, [b, k] each, and what V is multiplied by."""

    diagonal: Array
    off: Array
    coefficients: Array  # [2 s + 1, k + 1, b] of b_i v_{i+1}: the z, the Ritz vector, V T z + b_k v_{k+1} z_k
    size: float  # largest sum of magnitudes of a z


class _Measured(NamedTuple):
    """One operator's lower side, an upper bound on the largest ||F z||, and the vector that attains the lower side."""

    lower: float
    residual: float
    vector: Tensor


def certify(
    ops: Sequence[AnyOperator], run: Recurrence, steps: list[int], overlaps: Array, plan: Plan, sketches: Sketches
) -> list[Iterate]:
    """Intervals of operators after ``steps`` steps each, from starts whose least overlaps are given."""
    b = plan.starts
    alpha, beta = run.coefficients(max(steps))
    chains = []
    for i, (k, z) in enumerate(zip(steps, _gaussian(steps, plan, sketches.amount), strict=True)):
        own = slice(i * b, (i + 1) * b)
        chains.append(_chains(alpha[own, :k], beta[own, : k + 1], z))
    found: list[_Measured] = []
    for part in _parts(ops, sketches.amount + 1, run.device):
        found += _measure([ops[i] for i in part], [run.basis(i, steps[i] + 1) for i in part], [chains[i] for i in part])
    uppers = np.zeros(len(ops))
    together = defaultdict(list)
    for i, k in enumerate(steps):
        together[k].append(i)
    for group in together.values():
        diagonal = np.concatenate([chains[i].diagonal for i in group])
        off = np.concatenate([chains[i].off for i in group])
        last = np.array([1.0 + norm_error(ops[i]) for i in group]).repeat(b)
        residuals = np.array([found[i].residual / sketches.scale for i in group]).repeat(b)
        bounds = krylov_bound(diagonal, off, last, residuals, overlaps[group].repeat(b))
        uppers[group] = bounds.reshape(-1, b).max(axis=1)
    vectors = [
        from_rows(m.vector, op.input_shape)[0] if plan.keep_vectors else None for m, op in zip(found, ops, strict=True)
    ]
    lowers = [m.lower for m in found]
    return [Iterate(*interval) for interval in zip(lowers, uppers.tolist(), steps, vectors, strict=True)]


def _parts(ops: Sequence[AnyOperator], vectors: int, device: torch.device) -> Iterator[list[int]]:
    """Runs of operators to be measured together, within a working set."""
    most = _WORKING_SET if device.type == "cpu" else 32 * _WORKING_SET
    part: list[int] = []
    used = 0
    for i, op in enumerate(ops):
        needed = 8 * (4 * vectors * math.prod(op.input_shape) + 2 * weight_numel(op))
        if part and used + needed > most:
            yield part
            part, used = [], 0
        part.append(i)
        used += needed
    yield part


def _measure(ops: list[AnyOperator], bases: list[list[Tensor]], chains: list[_Chains]) -> list[_Measured]:
    """Apply the operators in float64 to what is combined from their bases."""
    vectors = (len(chains[0].coefficients) + 1) // 2
    # Rounding the weights to the plan's arithmetic is part of F, which is measured against the exact ones.
    exact = stack(ops, vectors, torch.float64)
    sums = [_combine(basis, torch.from_numpy(c.coefficients)) for basis, c in zip(bases, chains, strict=True)]
    images, squares = exact.forward(torch.cat([total[:vectors].flatten() for total in sums]))
    back, _ = exact.adjoint(images)
    lengths, norms = [], []
    for total, place in zip(sums, exact.domain, strict=True):
        lengths.append(torch.linalg.vector_norm(total[vectors - 1 : vectors]))
        missed = back[place].unflatten(0, (vectors, -1))[:-1].sub_(total[vectors:])
        norms.append(torch.linalg.vector_norm(missed, dim=1).max())
    numbers = torch.stack([torch.stack(lengths), squares[vectors - 1 :: vectors], torch.stack(norms)], dim=1).tolist()
    found = []
    for i, (op, (length, square, norm)) in enumerate(zip(ops, numbers, strict=True)):
        relative, slack, bound = norm_error(op), forward_error(op), magnitude(op)
        lower = (math.sqrt(square) / length * (1.0 - relative) - slack) if length > 0.0 else 0.0
        # Evaluating F z in float64 rounds too: the two applications, and the sums that form V z and V T z.
        columns = chains[i].off.size
        evaluation = chains[i].size * (2.1 * slack * bound + 1e-15 * (columns + 8) * bound**2)
        vector = sums[i][vectors - 1 : vectors]
        found.append(_Measured(max(lower, 0.0), norm * (1.0 + relative) + evaluation, vector))
    return found


def _gaussian(steps: list[int], plan: Plan, amount: int) -> list[Array]:
    """Gaussian vectors for each operator, [amount, k, b], brought to the host at once."""
    shapes = [(amount, k, plan.starts) for k in steps]
    generator = plan.generator
    drawn = [torch.randn(s, dtype=torch.float64, generator=generator, device=generator.device) for s in shapes]
    host = torch.cat([z.flatten() for z in drawn]).cpu().split([z.numel() for z in drawn])
    return [z.view(shape).numpy() for z, shape in zip(host, shapes, strict=True)]


def _chains(alpha: Array, beta: Array, z: Array) -> _Chains:
    """Decompose T, and spell out what V is multiplied by; alpha [b, k], beta [b, k + 1], z [amount, k, b]."""
    amount, k, b = z.shape
    diagonal, off = normal_equations(alpha, beta)
    values, tops = top_pairs(diagonal, off)
    inner = np.zeros((amount + 1, k + 1, b))
    inner[:-1, :k] = z
    best = int(values.argmax())
    inner[-1, :k, best] = tops[best]
    expected = np.zeros((amount, k + 1, b))
    expected[:, :k] = diagonal.T * z
    expected[:, 1:] += off.T * z
    expected[:, : k - 1] += off.T[:-1] * z[:, 1:]
    lengths = beta.T
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
    return _Chains(diagonal, off, np.concatenate([inner, expected]) * inverse, np.abs(z).sum(axis=(1, 2)).max())


def _combine(basis: list[Tensor], coefficients: Tensor) -> Tensor:
    """Sums of a basis in parts [steps, b, N], in float64: [r, N] for coefficients [r, all steps, b]."""
    size = basis[0].shape[2]
    rows = [r.flatten(1).to(basis[0].device) for r in coefficients.split([len(part) for part in basis], dim=1)]
    sums = rows[0].new_empty(len(rows[0]), size)
    on_gpu = basis[0].device.type == "cuda"
    width = min(size, max(_WIDTH, _AT_ONCE // sum(r.shape[1] for r in rows)) if on_gpu else _WIDTH)
    wide = rows[0].new_empty(max(len(part) for part in basis) * basis[0].shape[1] * width)
    out = rows[0].new_empty(len(rows[0]) * width)
    for at in range(0, size, width):
        n = min(width, size - at)
        total = out[: len(rows[0]) * n].view(-1, n).zero_()
        for part, r in zip(basis, rows, strict=True):
            columns = wide[: r.shape[1] * n].view(*part.shape[:2], n)
            total.addmm_(r, columns.copy_(part[..., at : at + n]).flatten(0, 1))
        sums[:, at : at + n] = total
    return sums
