"""What broadcasting does to constants: an element that is used several times counts as often."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlip.lipschitz._intervals import EPS, TINY


def copies(shape: Sequence[int], output_shape: Sequence[int]) -> float:
    """Norm of the map that broadcasts samples of one shape to another: the root of the copies of each element."""
    count = math.prod(output_shape) / max(math.prod(shape), 1)
    return math.sqrt(count) * (1.0 + EPS) if count != 1.0 else 1.0


def largest_slice(
    magnitude: Tensor,  # [*other], which broadcasts to output_shape
    shape: Sequence[int],
    output_shape: Sequence[int],
) -> float:
    """Norm of the map that multiplies samples of one shape by factors of given magnitudes, both broadcast.

    Each element is multiplied by the factors at all places to which it is broadcast: the norm is the largest L2 norm of
    such a slice of the factors.

    Args:
        magnitude: upper bounds on the factors' magnitudes, float64.
        shape: shape of a sample that is multiplied.
        output_shape: shape of a sample of the product.

    Returns:
        The norm, rounded upwards; inf if a factor is unbounded.
    """
    if not math.prod(output_shape):
        return 0.0
    rank = len(output_shape)
    sizes = (*(1,) * (rank - len(shape)), *shape)
    factors = magnitude.reshape((1,) * (rank - magnitude.dim()) + magnitude.shape)
    # Over these axes an element of the sample is repeated; where the factor is too, its square counts as often.
    axes = [axis for axis in range(rank) if sizes[axis] == 1 < output_shape[axis]]
    repeated = math.prod(output_shape[axis] for axis in axes if factors.shape[axis] == 1)
    largest = factors.max().item()
    if not math.isfinite(largest) or largest == 0.0:
        return largest
    squares = (factors / largest).square()
    summed = squares.sum(axes) if axes else squares
    count = math.prod(factors.shape[axis] for axis in axes)
    return math.sqrt(summed.max().item() * repeated) * largest * (1.0 + EPS * (count + 8)) + TINY


def least(bounds: Sequence[float]) -> float:
    """The smallest of several upper bounds, NaN counting as none."""
    return min((bound for bound in bounds if not math.isnan(bound)), default=math.inf)


def largest_element(t: Tensor) -> float:
    """The largest element of a tensor, 0 without any."""
    return t.max().item() if t.numel() else 0.0


def spectral_norm(
    magnitude: Tensor,  # [*batch, n, m]
    norm: float,
    row_sum: float = math.inf,
) -> float:
    """Upper bound on the spectral norm of each of several matrices with elements of given magnitudes.

    Args:
        magnitude: upper bounds on the elements' magnitudes, float64.
        norm: upper bound on the Frobenius norm of all of them together.
        row_sum: upper bound on the sum of the magnitudes in a row, where more is known than the elements say.
    """
    if not magnitude.numel():
        return 0.0
    largest = magnitude.max().item()
    if not math.isfinite(largest) or largest == 0.0:
        return least([norm, largest])
    relative = magnitude / largest
    slack = 1.0 + EPS * (magnitude.shape[-1] * magnitude.shape[-2] + 8)
    frobenius = torch.linalg.vector_norm(relative, dim=(-2, -1)).max().item() * largest * slack
    rows = min(relative.sum(-1).max().item() * largest, row_sum)
    columns = relative.sum(-2).max().item() * largest
    # The norm's square is at most the product of the largest sum of a row and of a column.
    return least([norm, frobenius + TINY, math.sqrt(rows) * math.sqrt(columns) * slack + TINY])
