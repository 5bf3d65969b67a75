"""Operators whose norm is exact: those that are a small matrix, and those that can be written as one."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastlip.norms._interval import NormInterval
from fastlip.norms._operator import Operator, TorchOperator

_EPS = torch.finfo(torch.float64).eps
# Up to this side the eigenvalue solver is about as fast a way to the largest eigenvalue.
_EIGEN_SIDE = 512


def trim(op: Operator) -> Operator:
    """The same operator without the outer taps that, with zero padding, only ever meet zeros."""
    if op.padding_mode != "zeros":
        return op
    weight, pads = op.weight, []
    for axis, (n, (left, right), d) in enumerate(zip(op.input_size, op.padding, op.dilation, strict=True)):
        k = op.kernel[axis]
        starts = _window_starts(op, axis)
        alive = [j for j in range(k) if any(0 <= start + j * d < n for start in starts)]
        first, last = (alive[0], alive[-1]) if alive else (0, k - 1)
        weight = weight.narrow(axis + 2, first, last - first + 1)
        pads.append((left - d * first, right - d * (k - 1 - last)))
    return replace(op, weight=weight, padding=tuple(pads))


def simplify(op: Operator) -> Operator:
    """An operator with the same norm and fewer taps or axes.

    If, with zero padding and after trimming, no two windows overlap and one of them lies inside the input, A A^T is
    block diagonal and its largest block is the flattened kernel's; the same holds when one window is all there is. The
    result then is that matrix, with no spatial axes.
    """
    if op.padding_mode != "zeros" or not op.kernel:
        return op
    op = trim(op)
    disjoint = True
    for axis, (n, d, s, k, m) in enumerate(
        zip(op.input_size, op.dilation, op.stride, op.kernel, op.output_size, strict=True)
    ):
        inside = any(start >= 0 and start + d * (k - 1) < n for start in _window_starts(op, axis))
        disjoint = disjoint and inside and (m == 1 or k == 1 or (d == 1 and k <= s))
    return Operator(op.weight.flatten(1), groups=op.groups) if disjoint else op


def _window_starts(op: Operator, axis: int) -> list[int]:
    """Position of each window's first tap; negative in the padding."""
    return [o * op.stride[axis] - op.padding[axis][0] for o in range(op.output_size[axis])]


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


def _from_unit_vectors(op: Operator) -> Tensor:
    """One column per input position, all groups at once."""
    g, pixels = op.groups, math.prod(op.input_size)
    channels = op.input_shape[0] // g
    units = torch.eye(channels * pixels, dtype=torch.float64, device=op.weight.device)
    stacked = units.reshape(-1, channels, *op.input_size).repeat(1, g, *(1 for _ in op.input_size))
    images = TorchOperator(op, op.weight.double()).forward(stacked)  # [columns, Cout, *output]
    return images.flatten(2).unflatten(1, (g, -1)).flatten(2).permute(1, 2, 0)


def dense_norm(op: Operator, rtol: float, method: str = "svd") -> NormInterval:
    """Largest singular value over the groups' matrices, from the smaller Gram matrix's eigenvalues.

    The interval covers rounding: forming the Gram matrix costs at most (reduction length + 2) units of ||M||_F^2
    (Higham 2002, section 3.5), padding modes that repeat pixels as many more as taps were summed before.
    """
    matrices = dense_matrix(op)
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    units = matrices.shape[2] + math.prod(op.kernel) + 20
    lower, upper = 0.0, 0.0
    for matrix in matrices.split(max(1, (1 << 22) // matrices.shape[1] ** 2)):
        gram = matrix @ matrix.mT
        error = (_EPS * units * matrix.square().sum((1, 2))).max().item()
        low, high = largest_eigenvalue(gram)
        lower, upper = max(lower, low - error), max(upper, high + error)
    lower, upper = math.sqrt(lower), math.sqrt(upper)
    return NormInterval(lower, upper, 1.0, method, 0, upper <= lower * (1.0 + rtol) or upper == 0.0)


def largest_eigenvalue(matrices: Tensor) -> tuple[float, float]:
    """Both sides of the largest eigenvalue of symmetric positive semidefinite matrices, [B, n, n] float64.

    Small ones by the eigenvalue solver, whose error is at most a modest multiple of n units of ||G||_F. A single large
    one by a Rayleigh quotient and the Cholesky factorisation of t I - G, which runs to its end only if t, moved by its
    backward error of (n + 1) units of the trace of t I, is above all eigenvalues (S. M. Rump, "Verification of positive
    definiteness", BIT 46, 2006). That takes a fraction of the time, and far fewer synchronisations between threads.
    """
    n = matrices.shape[1]
    slack = 10.0 * n * _EPS * torch.linalg.matrix_norm(matrices).max().item()
    if len(matrices) == 1 and n > _EIGEN_SIDE:
        theta = _ritz_value(matrices[0])
        identity = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
        for excess in (1e-9, 1e-8):
            t = theta * (1.0 + excess)
            if int(torch.linalg.cholesky_ex(t * identity - matrices[0]).info) == 0:
                return max(theta - slack, 0.0), t * (1.0 + 2.0 * _EPS * n * (n + 2))
    theta = max(torch.linalg.eigvalsh(matrices)[:, -1].max().item(), 0.0)
    return max(theta - slack, 0.0), theta + slack


def _ritz_value(matrix: Tensor) -> float:
    """A Rayleigh quotient of a symmetric matrix [n, n], close to its largest eigenvalue: Lanczos, orthogonalised twice.

    The start is the matrix's heaviest column with a little of everything. Nothing rests on its being a good one.
    """
    v = matrix[:, int(matrix.diagonal().argmax())]
    v = v + 1e-3 * v.abs().max()
    basis = [v / torch.linalg.vector_norm(v)]
    images: list[Tensor] = []
    last = 0.0
    for step in range(1, min(len(matrix), 160) + 1):
        images.append(matrix @ basis[-1])
        if step % 8 == 0 or step == len(matrix):
            span = torch.stack(basis)
            theta = torch.linalg.eigvalsh(span @ torch.stack(images, 1))
            if theta[-1].item() <= last * (1.0 + 1e-11):
                break
            last = theta[-1].item()
        w, span = images[-1], torch.stack(basis)
        for _ in range(2):
            w = w - (span @ w) @ span
        length = torch.linalg.vector_norm(w)
        if length <= 1e-14 * torch.linalg.vector_norm(images[-1]):
            break
        basis.append(w / length)
    span = torch.stack(basis[: len(images)])
    _, vectors = torch.linalg.eigh(span @ torch.stack(images, 1))
    y = vectors[:, -1] @ span
    return ((y @ (matrix @ y)) / (y @ y)).item()
