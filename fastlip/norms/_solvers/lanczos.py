"""Golub-Kahan-Lanczos bidiagonalisation from several starts, with the Krylov certificate.

All operators run at once, in float32 (or float64), without re-orthogonalisation: the certificate needs none, and ghosts
of converged Ritz values cost nothing here. What rounding did is measured afterwards. F = A^T A V - V T -
b_k v_{k+1} e_k^T, taken over all chains of an operator at once, is applied in float64 to a few Gaussian vectors; with a
share of eta of its own this bounds ||F||, whatever arithmetic ran.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastlip.norms._operators.composed import AnyOperator
from fastlip.norms._solvers.a_posteriori import Sketches, certify
from fastlip.norms._solvers.batched import stack
from fastlip.norms._solvers.certificate import Array, krylov_bound, overlap, sketch_scale, top_pairs
from fastlip.norms._solvers.iteration import Indices, IterationConfig, IterationResult, draw_starts, grain, on_device
from fastlip.norms._solvers.recurrence import Reading, Recurrence

_SKETCH_SHARE = 0.1
_FIRST_CHECK = 6
_PATIENCE = 18
#: Relative width of the brackets of bounds that decide when to stop and nothing else.
_COARSE = 1e-5


def lanczos_norms(ops: Sequence[AnyOperator], config: IterationConfig) -> list[IterationResult]:
    """Intervals for operators that can be stacked; each upper side fails with probability at most ``config.eta``."""
    operators = stack(ops, config.starts, config.dtype)
    config = on_device(config, operators.device)
    sizes = [math.prod(op.input_shape) for op in ops]
    starts, moved = draw_starts(sizes, config, operators.device)
    overlaps = [overlap(size, config.eta * (1.0 - _SKETCH_SHARE), config.starts) for size in sizes]
    furthest, run = Reading(moved), Recurrence(operators, starts)
    least = np.array(overlaps) - furthest.wait().numpy()
    if least.min() <= 0.0:
        raise ValueError(
            f"starts={config.starts} in {config.dtype} cannot be certified at this confidence, since rounding the "
            "starts moves them by more than their least overlap; use starts=4 or dtype=torch.float64"
        )
    sketches = _sketches(config, least.min())
    steps = _iterate(run, least, config, sketches.scale)
    return certify(ops, np.array(sizes), run, steps, least, config, sketches)


def _iterate(run: Recurrence, overlaps: Array, config: IterationConfig, scale: float) -> Indices:
    """Run every operator until its interval is expected to be narrow enough; the steps each of them took."""
    steps, open_ = np.zeros(len(overlaps), dtype=np.int64), np.arange(len(overlaps), dtype=np.int64)
    narrowest: list[tuple[int, Array]] = []  # so far, after so many steps
    check, least, ahead = _FIRST_CHECK, grain(run.device).steps, grain(run.device).ahead
    while True:
        run.advance(min(check, config.max_steps) - run.steps)
        k = min(run.steps, config.max_steps)
        reading = run.matrices(k, open_)
        if k < config.max_steps:
            run.advance(ahead)
        widths = _expected_widths(reading.wait().numpy(), overlaps[open_], config, scale)
        so_far = narrowest[-1][1].copy() if narrowest else np.full(len(overlaps), math.inf)
        so_far[open_] = np.minimum(so_far[open_], widths)
        narrowest.append((k, so_far))
        on = (widths > 0.97 * config.rtol) & ~_stalled(narrowest)[open_] & (k < config.max_steps)
        steps[open_[~on]] = k
        if not on.any():
            return steps
        if not on.all():
            open_ = open_[on]
            active = np.zeros(len(overlaps), dtype=bool)
            active[open_] = True
            run.active.copy_(torch.from_numpy(active), non_blocking=True)
        # The bound closes in like 1 / k^2 at first, faster later.
        wanted = k * math.sqrt(min(widths[on].min().item(), 1e3) / config.rtol)
        check = k + max(least, round(0.6 * (min(wanted, 2.0 * k) - k)))


def _stalled(narrowest: list[tuple[int, Array]]) -> NDArray[np.bool_]:
    """Whether the last steps made no difference: rounding sets a floor, below which more of them do not help."""
    last, now = narrowest[-1]
    early = [widths for k, widths in narrowest if k <= last - _PATIENCE]
    return now > 0.98 * early[-1] if early else np.zeros(len(now), dtype=bool)


def _sketches(config: IterationConfig, smallest: float) -> Sketches:
    """Enough Gaussian vectors, each of which costs one application in float64.

    The rounding expected of a usual number of steps shall be a small part of the overlap, the more so the narrower the
    interval that is asked for.
    """
    share = 0.3 if config.rtol >= 5e-3 else 0.04 if config.rtol >= 5e-4 else 0.0
    for amount in range(4, 17):
        scale = sketch_scale(config.eta * _SKETCH_SHARE, amount)
        if _rounding(config.dtype, 40 * config.starts, scale) <= share * smallest:
            break
    return Sketches(amount, scale)


def _rounding(dtype: torch.dtype, columns: int, scale: float) -> float:
    """What the bound on ||F|| usually comes to, in units of sigma_1^2: a unit of rounding or so in each column."""
    return 1.1 * torch.finfo(dtype).eps * math.sqrt(columns) / scale


def _expected_widths(matrices: Array, overlaps: Array, config: IterationConfig, scale: float) -> Array:
    """Relative widths of operators' intervals from their T, [2, chains, k], with rounding guessed.

    They decide when to stop and nothing else. The Gaussian vectors are looked at once, after the last step.
    """
    diagonal, off = matrices
    values, _ = top_pairs(diagonal, off)
    guess = values * _rounding(config.dtype, diagonal.shape[1] * config.starts, scale)
    upper = krylov_bound(diagonal, off, np.ones(len(values)), guess, overlaps.repeat(config.starts), _COARSE)
    top = np.sqrt(values)
    lower = top.reshape(-1, config.starts).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(upper.reshape(-1, config.starts).max(axis=1) / lower - 1.0, nan=0.0)
