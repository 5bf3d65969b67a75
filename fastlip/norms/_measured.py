"""After the last step: lower sides on explicit vectors, upper sides with the rounding that was measured, in float64."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    alpha, beta = (array.reshape(len(ops), b, -1) for array in run.coefficients(max(steps)))
    gaussian = _gaussian(steps, plan, sketches.amount)
    together = defaultdict(list)
    for i, k in enumerate(steps):
        together[k].append(i)
    chains: dict[int, _Chains] = {}
    for k, group in together.items():
        z = np.stack([gaussian[i] for i in group])
        chains |= zip(group, _chains(alpha[group, :, :k], beta[group, :, : k + 1], z), strict=True)
    found: list[_Measured] = []
    for part in _parts(ops, sketches.amount + 1, run.device):
        found += _measure([ops[i] for i in part], part, run, steps, [chains[i] for i in part])
    uppers = np.zeros(len(ops))
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


def _measure(
    ops: list[AnyOperator], which: list[int], run: Recurrence, steps: list[int], chains: list[_Chains]
) -> list[_Measured]:
    """Apply neighbours in the recurrence, in float64, to what is combined from their bases."""
    vectors = (len(chains[0].coefficients) + 1) // 2
    # Rounding the weights to the plan's arithmetic is part of F, which is measured against the exact ones.
    exact = stack(ops, vectors, torch.float64)
    coefficients = _on_device([c.coefficients for c in chains], run.device)
    alike = _alike(ops, [steps[i] for i in which], run.device)
    sums = []
    for own in alike:
        basis = run.basis(slice(which[own.start], which[own.start] + own.stop - own.start), steps[which[own.start]] + 1)
        sums.append(_combine(basis, torch.stack(coefficients[own])))
    images, squares = exact.forward(torch.cat([total[:, :vectors].flatten() for total in sums]))
    back, _ = exact.adjoint(images)
    lengths, norms = [], []
    for own, total in zip(alike, sums, strict=True):
        place = slice(exact.domain[own.start].start, exact.domain[own.stop - 1].stop)
        lengths.append(torch.linalg.vector_norm(total[:, vectors - 1], dim=1))
        missed = back[place].view(len(total), vectors, -1)[:, :-1].sub_(total[:, vectors:])
        norms.append(torch.linalg.vector_norm(missed, dim=2).amax(1))
    numbers = torch.stack([torch.cat(lengths), squares[vectors - 1 :: vectors], torch.cat(norms)], dim=1).tolist()
    best = [row for total in sums for row in total[:, vectors - 1 : vectors]]
    found = []
    for op, own_chains, (length, square, norm), vector in zip(ops, chains, numbers, best, strict=True):
        relative, slack, bound = norm_error(op), forward_error(op), magnitude(op)
        lower = (math.sqrt(square) / length * (1.0 - relative) - slack) if length > 0.0 else 0.0
        # Evaluating F z in float64 rounds too: the two applications, and the sums that form V z and V T z.
        columns = own_chains.off.size
        evaluation = own_chains.size * (2.1 * slack * bound + 1e-15 * (columns + 8) * bound**2)
        found.append(_Measured(max(lower, 0.0), norm * (1.0 + relative) + evaluation, vector))
    return found


def _alike(ops: Sequence[AnyOperator], steps: list[int], device: torch.device) -> list[slice]:
    """Runs of operators of one size after one number of steps; on a CPU, where launches are cheap, one at a time."""
    if device.type == "cpu":
        return [slice(i, i + 1) for i in range(len(ops))]
    kinds = [(math.prod(op.input_shape), k) for op, k in zip(ops, steps, strict=True)]
    begins = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return [slice(a, b) for a, b in pairwise([*begins, len(ops)])]


def _on_device(arrays: list[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on a device, by one copy."""
    flat = torch.from_numpy(np.concatenate([a.ravel() for a in arrays])).to(device)
    parts = flat.split([a.size for a in arrays])
    return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]


def _gaussian(steps: list[int], plan: Plan, amount: int) -> list[Array]:
    """Gaussian vectors for each operator, [amount, k, b], drawn and brought to the host at once."""
    shapes = [(amount, k, plan.starts) for k in steps]
    sizes, generator = [math.prod(shape) for shape in shapes], plan.generator
    drawn = torch.randn(sum(sizes), dtype=torch.float64, generator=generator, device=generator.device).cpu()
    return [z.view(shape).numpy() for z, shape in zip(drawn.split(sizes), shapes, strict=True)]


def _chains(alpha: Array, beta: Array, z: Array) -> list[_Chains]:
    """Of operators after k steps: decompose T, and spell out what V is multiplied by.

    alpha [n, b, k], beta [n, b, k + 1], z [n, amount, k, b].
    """
    n, amount, k, b = z.shape
    diagonal, off = (t.reshape(n, b, k) for t in normal_equations(alpha.reshape(-1, k), beta.reshape(-1, k + 1)))
    values, tops = top_pairs(diagonal.reshape(-1, k), off.reshape(-1, k))
    best, every = values.reshape(n, b).argmax(axis=1), np.arange(n)
    coefficients = np.zeros((n, 2 * amount + 1, k + 1, b))
    inner, expected = coefficients[:, : amount + 1], coefficients[:, amount + 1 :]
    inner[:, :-1, :k] = z
    inner[every, -1, :k, best] = tops.reshape(n, b, k)[every, best]
    across, down = diagonal.transpose(0, 2, 1)[:, None], off.transpose(0, 2, 1)[:, None]
    expected[:, :, :k] = across * z
    expected[:, :, 1:] += down * z
    expected[:, :, : k - 1] += down[:, :, :-1] * z[:, :, 1:]
    lengths = beta.transpose(0, 2, 1)[:, None]
    coefficients *= np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
    sizes = np.abs(z).sum(axis=(2, 3)).max(axis=1)
    return [_Chains(*row) for row in zip(diagonal, off, coefficients, sizes.tolist(), strict=True)]


def _combine(basis: list[Tensor], coefficients: Tensor) -> Tensor:
    """Sums of bases in parts [steps, n, b, N], in float64: [n, r, N] for coefficients [n, r, all steps, b]."""
    count, size = basis[0].shape[1], basis[0].shape[3]
    rows = [r.flatten(2) for r in coefficients.split([len(part) for part in basis], dim=2)]
    sums = rows[0].new_empty(count, rows[0].shape[1], size)
    on_gpu = basis[0].device.type == "cuda"
    most = _AT_ONCE // (count * sum(r.shape[2] for r in rows))
    width = min(size, max(_WIDTH, most) if on_gpu else _WIDTH)
    wide = rows[0].new_empty(count * max(r.shape[2] for r in rows) * width)
    out = rows[0].new_empty(count * rows[0].shape[1] * width)
    for at in range(0, size, width):
        n = min(width, size - at)
        total = out[: count * rows[0].shape[1] * n].view(count, -1, n).zero_()
        for part, r in zip(basis, rows, strict=True):
            columns = wide[: count * r.shape[2] * n].view(count, len(part), -1, n)
            total.baddbmm_(r, columns.copy_(part[..., at : at + n].transpose(0, 1)).flatten(1, 2))
        sums[..., at : at + n] = total
    return sums
