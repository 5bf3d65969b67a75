"""The tridiagonal matrices T = B^T B of bidiagonalisations, and their Ritz vectors."""

from typing import NamedTuple

import numpy as np
import torch

from fastlip import ops
from fastlip.norms._solvers.certificate import Array
from fastlip.norms._solvers.iteration_config import Indices


class EqualSteps(NamedTuple):
    """T of the operators that took the same number of steps k, one after the other for their b start vectors."""

    operators: Indices
    diagonal: Array  # [operators * b, k]
    off: Array


class Columns(NamedTuple):
    """Numbers for the vectors b_i v_{i+1}, i = 0 ... k, of one operator after the other: [vectors, b] each.

    The last vector of each operator has no row of T: its numbers are 0, but for its length.
    """

    diagonal: Array
    off: Array
    top: Array  # coefficients of the best start vector's Ritz vector
    inverse: Array  # reciprocals of the lengths b_i; 0 where a Krylov space is exhausted


def normal_equations(alpha: Array, beta: Array) -> tuple[Array, Array]:
    """Diagonal and off-diagonal of T = B^T B, [C, k] each, where B has the diagonal a_i and the off-diagonal b_i.

    Args:
        alpha: a_1 ... a_k, [C, k].
        beta: b_0 ... b_k, [C, k + 1]; b_0 is not used, and b_k only in the last off-diagonal, which couples to v_{k+1}.
    """
    diagonal = alpha**2
    diagonal[:, 1:] += beta[:, 1:-1] ** 2
    return diagonal, alpha * beta[:, 1:]


def top_pairs(diagonal: Array, off_diagonal: Array) -> tuple[Array, Array]:
    """Largest eigenvalues [C] and their unit vectors [C, k] of T, given by its diagonals [C, k]."""
    values, vectors = ops.top_eigenpairs(torch.from_numpy(diagonal), torch.from_numpy(off_diagonal))
    return values.numpy(), vectors.numpy()


def decompose(alpha: Array, beta: Array, steps: Indices, b: int) -> tuple[list[EqualSteps], Columns]:
    """The matrices T of operators after so many steps, and their Ritz vectors, with one call for each number of steps.

    alpha is [operators * b, at least k] and beta [operators * b, at least k + 1], with b start vectors to an operator.
    """
    alpha, beta = alpha.reshape(len(steps), b, -1), beta.reshape(len(steps), b, -1)
    ends = (steps + 1).cumsum()
    columns = Columns(*np.zeros((4, int(ends[-1]), b)))
    groups = []
    for k in np.unique(steps).tolist():
        i = np.flatnonzero(steps == k)
        lengths = beta[i, :, : k + 1]
        diagonal, off = normal_equations(alpha[i, :, :k].reshape(-1, k), lengths.reshape(-1, k + 1))
        groups.append(EqualSteps(i, diagonal, off))
        values, tops = top_pairs(diagonal, off)
        best = np.arange(b) == values.reshape(-1, b).argmax(axis=1)[:, None]
        rows = (ends[i] - (k + 1))[:, None] + np.arange(k + 1)
        diagonal, off, tops = (array.reshape(-1, b, k).transpose(0, 2, 1) for array in (diagonal, off, tops))
        columns.diagonal[rows[:, :-1]] = diagonal
        columns.off[rows[:, :-1]] = off
        columns.top[rows[:, :-1]] = np.where(best[:, None], tops, 0.0)
        lengths = lengths.transpose(0, 2, 1)
        columns.inverse[rows] = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
    return groups, columns
