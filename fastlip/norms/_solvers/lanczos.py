"""Golub-Kahan-Lanczos bidiagonalisation from several start vectors, with bounds by the Krylov certificate.

All operators run at once, in float32 (or float64), without re-orthogonalisation: the certificate needs none, and ghosts
of converged Ritz values cost nothing here. The effect of rounding is measured a posteriori: F = A^T A V - V T -
b_k v_{k+1} e_k^T, over all start vectors of an operator at once, is applied in float64 to a few Gaussian vectors. With
a share of eta of its own this bounds ||F||, whatever arithmetic ran.
"""

import math
from collections.abc import Sequence

import numpy as np

from fastlip.norms._operators.composed import AnyOperator
from fastlip.norms._solvers.a_posteriori import a_posteriori_bounds
from fastlip.norms._solvers.batched_operator import batched_operator
from fastlip.norms._solvers.certificate import start_overlap
from fastlip.norms._solvers.iteration_config import IterationConfig, IterationResult
from fastlip.norms._solvers.recurrence import Reading, Recurrence
from fastlip.norms._solvers.sketches import choose_sketches
from fastlip.norms._solvers.start_vectors import draw_starts, on_device
from fastlip.norms._solvers.stopping import run_until_narrow

#: Share of eta for the event that the Gaussian vectors miss ||F||; the rest is for the start vectors.
_SKETCH_SHARE = 0.1


def lanczos_norms(ops: Sequence[AnyOperator], config: IterationConfig) -> list[IterationResult]:
    """Intervals of operators of one kind; each upper side fails with probability at most ``config.eta``.

    Raises:
        ValueError: rounding moves the start vectors by too much for any certificate.
    """
    operators = batched_operator(ops, config.starts, config.dtype)
    config = on_device(config, operators.device)
    sizes = [math.prod(op.input_shape) for op in ops]
    starts, moved = draw_starts(sizes, config, operators.device)
    overlaps = [start_overlap(size, config.eta * (1.0 - _SKETCH_SHARE), config.starts) for size in sizes]
    furthest, run = Reading(moved), Recurrence(operators, starts)
    least = np.array(overlaps) - furthest.wait().numpy()
    if least.min() <= 0.0:
        raise ValueError(
            f"starts={config.starts} in {config.dtype} cannot be certified at this confidence, since rounding the "
            "starts moves them by more than their least overlap; use starts=4 or dtype=torch.float64"
        )
    sketches = choose_sketches(config, config.eta * _SKETCH_SHARE, least.min())
    steps = run_until_narrow(run, least, config, sketches.scale)
    return a_posteriori_bounds(ops, np.array(sizes), run, steps, least, config, sketches)
