"""Largest eigenvalues of small symmetric matrices, with certainty."""

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
#: Up to this side the eigenvalue solver is about as fast a way to the largest eigenvalue.
EIGEN_SIDE = 256
#: Rows of a Gram matrix, and columns of its factor, that are computed at a time.
_GRAM_ROWS = 128
_GRAM_COLUMNS = 512


def gram_matrix(matrices: Tensor) -> Tensor:
    """M M^T in float64 for matrices [B, n, m] of any dtype; of large ones the lower half alone is multiplied."""
    n, m = matrices.shape[1:]
    gram = matrices.new_zeros(len(matrices), n, n, dtype=torch.float64)
    # Only as many columns are brought to float64 at a time as stay in cache.
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

    Small matrices go to the eigenvalue solver, whose error is at most a modest multiple of n units of ||G||_F. A single
    large one is bounded by a Rayleigh quotient and the Cholesky factorisation of t I - G, which succeeds only if t,
    moved by the backward error of (n + 1) units of the trace of t I, is above all eigenvalues (S. M. Rump,
    "Verification of positive definiteness", BIT 46, 2006). That takes a fraction of the time, and far fewer
    synchronisations between threads. It takes less still with a relative ``accuracy`` above that of rounding, by which
    the two sides then differ at most.
    """
    n = matrices.shape[1]
    if n == 0:
        return 0.0, 0.0
    slack = 10.0 * n * _EPS * torch.linalg.matrix_norm(matrices).max().item()
    if len(matrices) == 1 and n > EIGEN_SIDE:
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

    The start vector is the matrix's heaviest column with a small constant added. No bound depends on its being a good
    one. The iteration ends once eight steps add no more than ``tolerance``.
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
