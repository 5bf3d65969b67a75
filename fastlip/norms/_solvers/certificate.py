"""Upper bounds on the largest singular value that hold with a stated probability over the random starts.

Sources: J. D. Dixon, "Estimating extremal eigenvalues and condition numbers of matrices", SIAM J. Numer. Anal. 20
(1983); J. L. M. van Dorsselaer, M. E. Hochstenbach and H. A. van der Vorst, "Computing probabilistic bounds for extreme
eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal. Appl. 22 (2001); M. E. Hochstenbach,
"Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput. 57 (2013).

All of them rest on one event. Let q be a unit eigenvector of A^T A for its largest eigenvalue and v uniform on the unit
sphere of R^N; then <q, v>^2 has the Beta(1/2, (N - 1) / 2) distribution. While |<q, v>| >= start_overlap(N, eta, b),
which fails for all of b independent start vectors with probability eta, every bound below holds, after any number of
steps.
"""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from fastlip import ops

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@lru_cache(maxsize=1024)
def start_overlap(dimension: int, eta: float, starts: int) -> float:
    """The number a with P(|<q, v>| < a) = eta^(1 / starts) for v uniform on the unit sphere of R^dimension.

    P is an integral of cos^(dimension - 2) from 0 to asin(a); the result is rounded towards 0.
    """
    if dimension == 1:
        return 1.0
    target = eta ** (1.0 / starts)
    log_scale = math.lgamma(dimension / 2) - math.lgamma((dimension - 1) / 2) - 0.5 * math.log(math.pi)

    def probability(angle: float) -> float:
        points = 0.5 * angle * (_NODES + 1.0)
        density = np.exp(log_scale + (dimension - 2) * np.log(np.cos(points)))
        return angle * float(_WEIGHTS @ density)

    # Beyond 40 standard deviations nothing is left, and a shorter interval keeps the quadrature exact.
    low, high = 0.0, min(0.5 * math.pi * (1.0 - 1e-15), 40.0 / math.sqrt(dimension))
    while probability(high / 2) > target:
        high /= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if probability(middle) < target else (low, middle)
    return math.sin(low) * (1.0 - 1e-6)


def sketch_scale(eta: float, sketches: int) -> float:
    """The number d with P(max_j |<w, z_j>| < d) = eta for a unit vector w and Gaussian z_1, ..., z_sketches.

    So ||F|| <= max_j ||F z_j|| / d fails with probability at most eta, for any F chosen independently of the z_j.
    """
    return NormalDist().inv_cdf(0.5 + 0.5 * eta ** (1.0 / sketches)) * (1.0 - 1e-6)


def krylov_bound(
    diagonal: Array, off_diagonal: Array, last: Array, residual: Array, overlaps: Array, tolerance: float = 1e-12
) -> Array:
    """:func:`fastlip.ops.krylov_bound` on arrays."""
    matrices = torch.from_numpy(diagonal), torch.from_numpy(off_diagonal)
    numbers = torch.from_numpy(last), torch.from_numpy(residual), torch.from_numpy(overlaps)
    return ops.krylov_bound(*matrices, *numbers, tolerance).numpy()


def power_bound(log_growth: Array, log_prefix: Array, log_error: Array, overlaps: Array) -> Array:
    """Dixon's upper bounds on sigma_1 after k steps of v <- A^T A v / c, with rounding; one per start vector.

    From c_i <q, v_{i+1}> = t <q, v_i> + e_i, t = sigma_1^2: |<q, v_1>| t^k is at most
    ||v_{k+1}|| c_1 ... c_k + sum_i |e_i| c_1 ... c_{i-1} t^{k-i}.

    Args:
        log_growth: log(c_1 ... c_k ||v_{k+1}||), [C].
        log_prefix: log(c_1 ... c_{i-1}) for i = 1 ... k, [C, k].
        log_error: logarithm of an upper bound on every |e_i|, [C].
        overlaps: lower bound on |<q, v_1>|, [C].

    Returns:
        Upper bounds on sigma_1, [C].
    """
    steps = log_prefix.shape[1]
    order = np.arange(1, steps + 1)

    def exceeds(log_t: Array) -> NDArray[np.bool_]:
        terms = log_error[:, None] + log_prefix - order * log_t[:, None]
        largest = np.maximum(terms.max(axis=1), log_growth - steps * log_t)
        total = np.exp(terms - largest[:, None]).sum(axis=1) + np.exp(log_growth - steps * log_t - largest)
        return ~(largest + np.log(total) <= np.log(overlaps))  # NaN counts as above

    low = log_growth / steps
    high = low + 1.0
    # Every doubling of the distance from `low` takes as much off the logarithm of each term as all before.
    for _ in range(64):
        beyond = exceeds(high)
        if not beyond.any():
            break
        high = np.where(beyond, high + (high - low), high)
    for _ in range(60):
        middle = 0.5 * (low + high)
        right = exceeds(middle)
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    return np.exp(0.5 * high) * (1.0 + 1e-12)
