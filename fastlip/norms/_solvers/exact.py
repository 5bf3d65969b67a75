"""Norms of operators that are small matrices, exact up to rounding."""

import math

import torch

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.dense import dense_matrix, entry_error
from fastlip.norms._operators.operator import Operator, matrix_entries, smallest_side
from fastlip.norms._options import ResolvedOptions
from fastlip.norms._solvers.eigenvalues import EIGEN_SIDE, gram_matrix, largest_eigenvalue

_EPS = torch.finfo(torch.float64).eps
#: Largest side of matrices that are decomposed: larger ones cost more than the iteration, which takes more steps the
#: narrower its interval is to be. GPUs iterate many at once, and leave the eigenvalues of a small matrix to the host,
#: which waits for each. Their limit is a guess that no GPU has measured.
_DENSE_SIDE = 512
_DENSE_SIDE_NARROW = 1024
_NARROW = 5e-3
_DENSE_SIDE_ON_GPU = 32
_DENSE_ENTRIES = 1 << 26
#: Width of matrices' intervals over the width asked for: they should cost no more than needed, and look exact beside
#: iterated ones.
_SHARPER = 0.01


def exact_norm(op: Operator, options: ResolvedOptions) -> NormInterval | None:
    """The interval of a normalised operator where its matrix is decomposed; None where it is to be iterated.

    Raises:
        ValueError: the matrix of the method "svd" does not fit into memory.
    """
    if options.method == "svd":
        needed = 8 * matrix_entries(op)
        if needed > options.max_memory:
            raise ValueError(f"method 'svd' needs {needed:.1e} bytes; raise max_memory or use 'auto'")
        return dense_norm(op, options.rtol)
    if options.method == "auto" and is_small(op, options.rtol):
        accuracy = _SHARPER * min(options.rtol, 1.0)
        return dense_norm(op, options.rtol, "svd" if op.kernel else "closed form", accuracy)
    return None


def is_small(op: Operator, rtol: float) -> bool:
    """Whether decomposing the operator's matrix takes less time than iterating it."""
    side, entries = smallest_side(op), matrix_entries(op)
    most = _DENSE_SIDE_NARROW if rtol < _NARROW else _DENSE_SIDE
    if op.weight.device.type != "cpu":
        most = _DENSE_SIDE_ON_GPU
    return entries == 0 or (side <= most and entries <= _DENSE_ENTRIES)


def dense_norm(op: Operator, rtol: float, method: str = "svd", accuracy: float = 0.0) -> NormInterval:
    """Largest singular value over the groups' matrices, from the smaller Gram matrix's eigenvalues.

    The interval covers rounding: that of the Gram matrix is at most (reduction length + 2) units of ||M||_F^2 (Higham
    2002, section 3.5), and that of the entries is added to it. ``accuracy`` is the one of :func:`largest_eigenvalue`.
    """
    matrices = dense_matrix(op) if op.kernel else op.weight.unflatten(0, (op.groups, -1))
    entries = entry_error(op)
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    units = matrices.shape[2] + math.prod(op.kernel) + 20
    lower, upper = 0.0, 0.0
    for matrix in matrices.split(max(1, (1 << 22) // matrices.shape[1] ** 2)):
        gram = gram_matrix(matrix)
        if gram.shape[1] <= EIGEN_SIDE:
            gram = gram.cpu()  # otherwise the host would wait for each number below
        error = (_EPS * units * gram.diagonal(dim1=1, dim2=2).sum(1)).max().item() * (1.0 + 2.0 * units * _EPS)
        low, high = largest_eigenvalue(gram, accuracy)
        lower, upper = max(lower, low - error), max(upper, high + error)
    lower, upper = max(math.sqrt(lower) - entries, 0.0), math.sqrt(upper) + entries
    return NormInterval(lower, upper, 1.0, method, 0, upper <= lower * (1.0 + rtol) or upper == 0.0)
