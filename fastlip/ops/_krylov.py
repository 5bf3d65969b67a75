"""The checked wrappers of the operators on small tridiagonal matrices, which always run on the CPU."""

import torch
from torch import Tensor

from fastlip._renamed import renamed_keywords


def top_eigenpairs(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, and unit eigenvectors, of symmetric positive semidefinite tridiagonal matrices.

    Args:
        diagonal: [C, k] float64 on the CPU, k at least 1.
        off_diagonal: [C, k], not negative; the last entry of each row is ignored.

    Returns:
        Eigenvalues [C], accurate to a few units in the last place of the matrix's norm, and eigenvectors [C, k].

    Raises:
        ValueError: a shape or device is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> diagonal, off_diagonal = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[0.5, 0.0]]).double()
        >>> values, vectors = ops.top_eigenpairs(diagonal, off_diagonal)
    """
    _check_matrices(diagonal, off_diagonal)
    values, vectors = torch.ops.fastlip.top_eigenpairs(diagonal.contiguous(), off_diagonal.contiguous())
    return values, vectors


@renamed_keywords(overlaps="start_overlap")
def krylov_bound(
    diagonal: Tensor,  # [C, k] float64
    off_diagonal: Tensor,  # [C, k] float64
    last: Tensor,  # [C] float64
    residual: Tensor,  # [C] float64
    start_overlap: Tensor,  # [C] float64
    tolerance: float = 1e-12,
) -> Tensor:
    """Upper bounds on sigma_1 from Lanczos tridiagonal matrices T, one per start vector; [C] float64.

    With A^T A V = V T + b_k v_{k+1} e_k^T + F the bound on sigma_1^2 is the root t, right of T's eigenvalues, of
    ||v_{k+1}|| b_1 ... b_k / det(t I - T) + ||F|| ||(t I - T)^{-1} e_1|| = start_overlap (van Dorsselaer, Hochstenbach
    and van der Vorst 2001, extended by the rounding errors F). V need not be orthogonal. The rounding of this function
    itself is covered as part of F.

    Args:
        diagonal: of T, [C, k] float64 on the CPU, k at least 1; T is positive semidefinite.
        off_diagonal: b_1 ... b_k, [C, k], not negative; the last one couples to v_{k+1}.
        last: norm of v_{k+1}, [C].
        residual: upper bound on ||F||, [C].
        start_overlap: lower bound on ``|<q, v_1>|`` for the eigenvector q of sigma_1^2, [C]; where it is not positive,
            the result is inf.
        tolerance: relative width of the bracket around the root; its upper end is returned, so the bound holds with any
            tolerance.

    Raises:
        ValueError: a shape, device or value is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> diagonal, off_diagonal = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[0.5, 0.1]]).double()
        >>> print(ops.krylov_bound(diagonal, off_diagonal, one, 1e-12 * one, start_overlap=1e-3 * one))
    """
    _check_matrices(diagonal, off_diagonal)
    for name, numbers in {"last": last, "residual": residual, "start_overlap": start_overlap}.items():
        _check(name, numbers, [len(diagonal)])
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    arguments = (t.contiguous() for t in (diagonal, off_diagonal, last, residual, start_overlap))
    upper: Tensor = torch.ops.fastlip.krylov_bound(*arguments, tolerance)
    return upper


def _check_matrices(diagonal: Tensor, off_diagonal: Tensor) -> None:
    if diagonal.dim() != 2 or diagonal.shape[1] == 0:
        raise ValueError(f"diagonal must be [matrices, steps] with at least one step, got {list(diagonal.shape)}")
    _check("diagonal", diagonal, list(diagonal.shape))
    _check("off_diagonal", off_diagonal, list(diagonal.shape))


def _check(name: str, tensor: Tensor, shape: list[int]) -> None:
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name} must be float64, got {tensor.dtype}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
