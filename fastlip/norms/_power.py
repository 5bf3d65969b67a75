"""Power iteration on A^T A with Dixon's certificate, in float64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fastlip.norms._certificate import overlap, power_bound
from fastlip.norms._composed import AnyOperator, forward_error, magnitude
from fastlip.norms._iterate import Iterate, Plan, draw_starts, norm_error
from fastlip.norms._stack import stack

_CHECK_EVERY = 10


def power_norms(ops: Sequence[AnyOperator], plan: Plan) -> list[Iterate]:
    """Intervals for operators that can be stacked; each upper side fails with probability at most ``plan.eta``.

    The certificate holds for every number of steps at once, so an operator stops at the first check that meets
    ``rtol``.
    """
    plan = replace(plan, dtype=torch.float64)
    operators, b = stack(ops, plan.starts, plan.dtype), plan.starts
    starts, overlaps = [], []
    for op in ops:
        size = math.prod(op.input_shape)
        v, moved = draw_starts(size, plan, operators.device)
        starts.append(v.flatten())
        overlaps.append(max(overlap(size, plan.eta, b) - moved, 0.0))
    relative = np.array([norm_error(op) for op in ops])
    slack, magnitudes = np.array([forward_error(op) for op in ops]), np.array([magnitude(op) for op in ops])
    # One application of A^T A, and the scaling before it, on vectors of norm at most 1 + relative.
    errors = 2.02 * (slack * magnitudes + relative * magnitudes**2)
    w = torch.cat(starts)
    square = torch.ones(len(ops) * b, dtype=torch.float64, device=w.device)
    prefix = np.zeros((len(ops), b, 1))
    lower, upper, steps = np.zeros(len(ops)), np.full(len(ops), math.inf), np.zeros(len(ops), dtype=int)
    active = torch.ones(len(ops), dtype=torch.bool, device=w.device)
    on = np.ones(len(ops), dtype=bool)
    while on.any():
        u, stretched = operators.forward(w, x_square=square, active=active)
        w, square = operators.adjoint(u, active=active)
        stretch = stretched.sqrt().reshape(-1, b).cpu().numpy()  # of vectors of norm 1 up to `relative`
        reached = (stretch.max(axis=1) - 1.01 * slack) * (1.0 - 2.0 * relative)
        lower[on] = np.maximum(lower, reached)[on]
        with np.errstate(divide="ignore"):
            logs = 0.5 * np.log(square.reshape(-1, b, 1).cpu().numpy())
        prefix = np.concatenate([prefix, prefix[..., -1:] + logs], axis=2)
        steps[on] += 1
        done = steps.max()
        if done % _CHECK_EVERY and done < plan.max_steps:
            continue
        for i in np.flatnonzero(on):
            total = prefix[i, :, -1] + relative[i]
            if overlaps[i] > 0.0 and np.isfinite(total).all():
                bounds = power_bound(total, prefix[i, :, :-1], math.log(errors[i]), np.full(b, overlaps[i]))
                upper[i] = min(upper[i], bounds.max())
        on &= (upper > lower * (1.0 + plan.rtol)) & (done < plan.max_steps)
        active = torch.from_numpy(on).to(w.device)
    found = zip(np.maximum(lower, 0.0).tolist(), upper.tolist(), steps.tolist(), strict=True)
    return [Iterate(*interval) for interval in found]
