"""When to stop a bidiagonalisation: steps are taken until intervals are expected to be narrow enough.

The widths expected here only decide when to stop. What is reported comes from the a-posteriori bounds.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fastlip.norms._solvers.certificate import Array, krylov_bound
from fastlip.norms._solvers.iteration_config import Indices, IterationConfig, device_limits
from fastlip.norms._solvers.recurrence import Recurrence
from fastlip.norms._solvers.sketches import expected_rounding
from fastlip.norms._solvers.tridiagonal import top_pairs

#: Steps before the first stopping test.
_FIRST_TEST = 6
#: Steps in which an interval must become narrower for the iteration to go on.
_PATIENCE = 18
#: Relative width of the brackets of the bounds in a stopping test.
_COARSE = 1e-5


def run_until_narrow(run: Recurrence, overlaps: Array, config: IterationConfig, scale: float) -> Indices:
    """Run every operator until its interval is expected to be narrow enough.

    Args:
        run: the recurrence, before its first step.
        overlaps: lower bounds on the overlap of each operator's best start vector, [operators].
        config: the accuracy that is asked for, and the most steps.
        scale: of the sketches that the rounding will be measured with.

    Returns:
        Steps that each operator took, [operators].
    """
    steps, open_ = np.zeros(len(overlaps), dtype=np.int64), np.arange(len(overlaps), dtype=np.int64)
    narrowest: list[tuple[int, Array]] = []  # widths so far, after so many steps
    test, limits = _FIRST_TEST, device_limits(run.device)
    while True:
        run.advance(min(test, config.max_steps) - run.steps)
        k = min(run.steps, config.max_steps)
        reading = run.matrices(k, open_)
        if k < config.max_steps:
            run.advance(limits.ahead)
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
        # The bound closes in like 1 / k^2 at first, and faster later.
        wanted = k * math.sqrt(min(widths[on].min().item(), 1e3) / config.rtol)
        test = k + max(limits.steps, round(0.6 * (min(wanted, 2.0 * k) - k)))


def _expected_widths(matrices: Array, overlaps: Array, config: IterationConfig, scale: float) -> Array:
    """Relative widths of operators' intervals from their T, [2, operators * starts, k], with rounding guessed."""
    diagonal, off = matrices
    values, _ = top_pairs(diagonal, off)
    guess = values * expected_rounding(config.dtype, diagonal.shape[1] * config.starts, scale)
    upper = krylov_bound(diagonal, off, np.ones(len(values)), guess, overlaps.repeat(config.starts), _COARSE)
    top = np.sqrt(values)
    lower = top.reshape(-1, config.starts).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(upper.reshape(-1, config.starts).max(axis=1) / lower - 1.0, nan=0.0)


def _stalled(narrowest: list[tuple[int, Array]]) -> NDArray[np.bool_]:
    """Whether the last steps made no difference: rounding sets a floor, below which more steps do not help."""
    last, now = narrowest[-1]
    early = [widths for k, widths in narrowest if k <= last - _PATIENCE]
    return now > 0.98 * early[-1] if early else np.zeros(len(now), dtype=bool)
