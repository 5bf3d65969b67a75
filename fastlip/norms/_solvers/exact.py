"""Operators whose norm is exact: those that are a small matrix, and those that can be written as one."""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.operator import Operator, TorchOperator, inherit_norm

_EPS = torch.finfo(torch.float64).eps
# Up to this side the eigenvalue solver is about as fast a way to the largest eigenvalue.
_EIGEN_SIDE = 256
# Rows of a Gram matrix, and columns of what it is made of, computed at a time.
_GRAM_ROWS = 128
_GRAM_COLUMNS = 512


def trim(op: Operator) -> Operator:
    """The same operator without the taps that, with zero padding, only ever meet zeros.

    The outer ones are cut off; those between others, as wide strides leave them, become 0. If no tap ever meets the
    input, all of the weight is 0, as the operator is.
    """
    if op.padding_mode != "zeros":
        return op
    alive = [window.alive for window in _windows(op)]
    if all(len(taps) == k for taps, k in zip(alive, op.kernel, strict=True)):
        return op
    if not all(alive):
        return replace(op, weight=torch.zeros_like(op.weight))
    weight, pads = op.weight, []
    for axis, (taps, (left, right)) in enumerate(zip(alive, op.padding, strict=True)):
        first, last = taps[0], taps[-1]
        weight = weight.narrow(axis + 2, first, last - first + 1)
        idle = [tap - first for tap in range(first, last) if tap not in taps]
        if idle:
            weight = weight.index_fill(axis + 2, torch.tensor(idle, device=weight.device), 0.0)
        spread = op.dilation[axis]
        pads.append((left - spread * first, right - spread * (op.kernel[axis] - 1 - last)))
    return inherit_norm(replace(op, weight=weight, padding=tuple(pads)), op)


def simplify(op: Operator) -> Operator:
    """An operator with the same norm and fewer taps or axes.

    If, with zero padding and after trimming, no two windows overlap and one of them lies inside the input, A A^T is
    block diagonal and its largest block is the flattened kernel's; the same holds when one window is all there is. The
    result then is that matrix, with no spatial axes.
    """
    return flatten(trim(op))


def flatten(op: Operator) -> Operator:
    """:func:`simplify` for what is trimmed already."""
    if op.padding_mode != "zeros" or not op.kernel:
        return op
    if not all(window.disjoint for window in _windows(op)):
        return op
    return inherit_norm(Operator(op.weight.flatten(1), groups=op.groups), op)


class _Window(NamedTuple):
    """How a kernel's windows lie along one axis, with zero padding."""

    alive: tuple[int, ...]  # taps that ever meet the input
    disjoint: bool  # whether no two overlap, and one lies inside the input


def _windows(op: Operator) -> list[_Window]:
    axes = zip(op.input_size, op.output_size, op.kernel, op.stride, op.dilation, op.padding, strict=True)
    return [_window(n, m, k, s, d, left) for n, m, k, s, d, (left, _) in axes]


@lru_cache(maxsize=1024)
def _window(n: int, m: int, k: int, stride: int, dilation: int, left: int) -> _Window:
    """For n inputs and m outputs."""

    def begins_between(first: int, end: int) -> bool:
        """Whether a window's first tap is at one of these positions, which are negative in the padding."""
        return max(0, -(-(first + left) // stride)) <= min(m - 1, (end - 1 + left) // stride)

    alive = tuple(j for j in range(k) if begins_between(-j * dilation, n - j * dilation))
    inside = begins_between(0, n - dilation * (k - 1))
    disjoint = inside and (m == 1 or k == 1 or (dilation == 1 and k <= stride))
    return _Window(alive, disjoint)


def smallest_side(op: Operator) -> int:
    """The smaller dimension of one group's matrix."""
    return min(math.prod(op.input_shape), math.prod(op.output_shape)) // op.groups


def matrix_entries(op: Operator) -> int:
    """Number of entries of all groups' matrices."""
    return math.prod(op.input_shape) * math.prod(op.output_shape) // op.groups


def dense_matrix(op: Operator) -> Tensor:
    """The operator's matrices, one per group, in float64: [groups, rows, columns]."""
    g, axes = op.groups, len(op.kernel)
    weight = op.weight.double().unflatten(0, (g, -1))  # [g, o, i, *kernel]
    if not axes:
        return weight
    if op.padding_mode != "zeros":
        return _from_unit_vectors(op)
    for axis, (n, (left, _), d, s, m) in enumerate(
        zip(op.input_size, op.padding, op.dilation, op.stride, op.output_size, strict=True)
    ):
        k, dim = op.kernel[axis], 3 + 2 * axis
        offset = torch.arange(n) - (torch.arange(m) * s - left)[:, None]  # [m, n], tap * dilation
        tap = torch.where((offset % d == 0) & (offset >= 0) & (offset < k * d), offset // d, k)
        zero = torch.zeros_like(weight.narrow(dim, 0, 1))
        weight = (
            torch.cat([weight, zero], dim).index_select(dim, tap.flatten().to(weight.device)).unflatten(dim, (m, n))
        )
    # [g, o, i, m0, n0, m1, n1, ...] to [g, o, m..., i, n...]
    order = (0, 1, *range(3, 3 + 2 * axes, 2), 2, *range(4, 4 + 2 * axes, 2))
    return weight.permute(order).flatten(1 + 1 + axes).flatten(1, 1 + axes)


def entry_error(op: Operator) -> float:
    """Bound on the 2-norm of what rounding adds to :func:`dense_matrix`.

    With zero padding an entry is a weight. Padding that repeats pixels adds several of them up, which may cancel: an
    error in each entry of as many units of the sum of their magnitudes.
    """
    return 0.0 if op.padding_mode == "zeros" else _EPS * math.prod(op.kernel) * op.absolute_bound


def _from_unit_vectors(op: Operator) -> Tensor:
    """One column per input position, all groups at once."""
    g, pixels = op.groups, math.prod(op.input_size)
    channels = op.input_shape[0] // g
    units = torch.eye(channels * pixels, dtype=torch.float64, device=op.weight.device)
    stacked = units.reshape(-1, channels, *op.input_size).repeat(1, g, *(1 for _ in op.input_size))
    images = TorchOperator(op, op.weight.double()).forward(stacked)  # [columns, Cout, *output]
    return images.flatten(2).unflatten(1, (g, -1)).flatten(2).permute(1, 2, 0)


def dense_norm(op: Operator, rtol: float, method: str = "svd", accuracy: float = 0.0) -> NormInterval:
    """Largest singular value over the groups' matrices, from the smaller Gram matrix's eigenvalues.

    The interval covers rounding: forming the Gram matrix costs at most (reduction length + 2) units of ||M||_F^2
    (Higham 2002, section 3.5); what the entries themselves are off by comes on top. ``accuracy`` is that of
    :func:`largest_eigenvalue`.
    """
    matrices = dense_matrix(op) if op.kernel else op.weight.unflatten(0, (op.groups, -1))
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    units = matrices.shape[2] + math.prod(op.kernel) + 20
    lower, upper = 0.0, 0.0
    for matrix in matrices.split(max(1, (1 << 22) // matrices.shape[1] ** 2)):
        gram = gram_matrix(matrix)
        if gram.shape[1] <= _EIGEN_SIDE:
            gram = gram.cpu()  # else each number below would be waited for
        error = (_EPS * units * gram.diagonal(dim1=1, dim2=2).sum(1)).max().item() * (1.0 + 2.0 * units * _EPS)
        low, high = largest_eigenvalue(gram, accuracy)
        lower, upper = max(lower, low - error), max(upper, high + error)
    entries = entry_error(op)
    lower, upper = max(math.sqrt(lower) - entries, 0.0), math.sqrt(upper) + entries
    return NormInterval(lower, upper, 1.0, method, 0, upper <= lower * (1.0 + rtol) or upper == 0.0)


def gram_matrix(matrices: Tensor) -> Tensor:
    """M M^T in float64 for matrices [B, n, m] of any dtype; of large ones the lower half alone is multiplied."""
    n, m = matrices.shape[1:]
    gram = matrices.new_zeros(len(matrices), n, n, dtype=torch.float64)
    # A few columns at a time are brought to float64 where they stay in cache.
    for part in (matrices[..., at : at + _GRAM_COLUMNS].double() for at in range(0, m, _GRAM_COLUMNS)):
        for start in range(0, n, _GRAM_ROWS):
            stop = min(start + _GRAM_ROWS, n)
            gram[:, start:stop, :stop].baddbmm_(part[:, start:stop], part[:, :stop].mT)
    for start in range(_GRAM_ROWS, n, _GRAM_ROWS):
        rows = slice(start, min(start + _GRAM_ROWS, n))
        gram[:, :start, rows] = gram[:, rows, :start].mT
    return gram


def largest_eigenvalue(matrices: Tensor, accuracy: float = 0.0) -> tuple[float, float]:
    """Both sides of the largest eigenvalue of symmetric positive semidefinite matrices, [B, n, n] float64.

    Small ones by the eigenvalue solver, whose error is at most a modest multiple of n units of ||G||_F. A single large
    one by a Rayleigh quotient and the Cholesky factorisation of t I - G, which runs to its end only if t, moved by its
    backward error of (n + 1) units of the trace of t I, is above all eigenvalues (S. M. Rump, "Verification of positive
    definiteness", BIT 46, 2006). That takes a fraction of the time, and far fewer synchronisations between threads; it
    takes less still with a relative ``accuracy`` above that of rounding, which the two sides then differ by at most.
    """
    n = matrices.shape[1]
    slack = 10.0 * n * _EPS * torch.linalg.matrix_norm(matrices).max().item()
    if len(matrices) == 1 and n > _EIGEN_SIDE:
        theta = _ritz_value(matrices[0], max(1e-11, accuracy / 300.0))
        shifted = -matrices[0]
        for excess in (max(1e-9, accuracy / 10.0), max(1e-8, accuracy)):
            t = theta * (1.0 + excess)
            shifted.diagonal().copy_(t - matrices[0].diagonal())
            if int(torch.linalg.cholesky_ex(shifted).info) == 0:
                return max(theta - slack, 0.0), t * (1.0 + 2.0 * _EPS * n * (n + 2))
    theta = max(torch.linalg.eigvalsh(matrices)[:, -1].max().item(), 0.0)
    return max(theta - slack, 0.0), theta + slack


def _ritz_value(matrix: Tensor, tolerance: float) -> float:
    """A Rayleigh quotient of a symmetric matrix [n, n], close to its largest eigenvalue: Lanczos, orthogonalised twice.

    The start is the matrix's heaviest column with a little of everything. Nothing rests on its being a good one. It
    ends once eight steps add no more than ``tolerance``.
    """
    v = matrix[:, int(matrix.diagonal().argmax())]
    v = v + 1e-3 * v.abs().max()
    if not v.any():
        return 0.0
    most = min(len(matrix), 160)
    basis, images = matrix.new_empty(most, len(matrix)), matrix.new_empty(most, len(matrix))
    basis[0] = v / torch.linalg.vector_norm(v)
    last = 0.0
    for step in range(1, most + 1):
        w = torch.mv(matrix, basis[step - 1], out=images[step - 1])
        if step % 8 == 0 or step == most:
            theta = torch.linalg.eigvalsh(basis[:step] @ images[:step].mT)[-1].item()
            if theta <= last * (1.0 + tolerance):
                break
            last = theta
        for _ in range(2):
            w = torch.addmv(w, basis[:step].mT, basis[:step] @ w, alpha=-1.0)
        length = torch.linalg.vector_norm(w).item()
        if step == most or length <= 1e-14 * last:
            break
        torch.div(w, length, out=basis[step])
    _, vectors = torch.linalg.eigh(basis[:step] @ images[:step].mT)
    y = vectors[:, -1] @ basis[:step]
    return ((y @ (matrix @ y)) / (y @ y)).item()
