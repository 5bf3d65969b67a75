"""Power iteration on A^T A with Dixon's certificate, in float64."""

import math
from dataclasses import replace

import numpy as np
import torch

from fastlip.norms._certificate import overlap, power_bound
from fastlip.norms._composed import AnyOperator, device_of, forward_error, magnitude, make_batch
from fastlip.norms._iterate import Iterate, Plan, draw_starts, norm_error

_CHECK_EVERY = 10


def power_norms(ops: list[AnyOperator], plan: Plan) -> list[Iterate]:
    """Intervals for operators of one geometry; each upper side fails with probability at most ``plan.eta``.

    The certificate holds for every number of steps at once, so iteration stops at the first check that meets ``rtol``.
    """
    batch = make_batch(ops, torch.float64)
    size = math.prod(ops[0].input_shape)
    v, moved = draw_starts(ops[0].input_shape, len(ops), replace(plan, dtype=torch.float64), device_of(ops[0]))
    overlaps = max(overlap(size, plan.eta, plan.starts) - moved, 0.0)
    slack = np.array([forward_error(op) for op in ops])
    magnitudes = np.array([magnitude(op) for op in ops])
    relative = norm_error(ops[0])
    # One application of A^T A, and the scaling after it, on vectors of norm at most 1 + relative.
    errors = 2.02 * (slack * magnitudes + relative * magnitudes**2)
    prefix = np.zeros((len(ops), plan.starts, 1))
    lower, upper = np.zeros(len(ops)), np.full(len(ops), math.inf)
    axes = tuple(range(2, v.dim()))
    steps = 0
    while steps < plan.max_steps:
        u = batch.forward(v)
        stretch = torch.linalg.vector_norm(u, dim=axes).cpu().numpy()  # v has norm 1 up to `relative`
        lower = np.maximum(lower, (stretch.max(axis=1) - 1.01 * slack) * (1.0 - 2.0 * relative))
        v = batch.adjoint(u)
        growth = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
        v = torch.where(growth > 0.0, v / growth, v)
        with np.errstate(divide="ignore"):
            logs = np.log(growth.reshape(len(ops), plan.starts, 1).cpu().numpy())
        prefix = np.concatenate([prefix, prefix[..., -1:] + logs], axis=2)
        steps += 1
        if steps % _CHECK_EVERY and steps < plan.max_steps:
            continue
        for i in range(len(ops)):
            start = np.full(plan.starts, overlaps)
            total = prefix[i, :, -1] + relative
            if overlaps > 0.0 and np.isfinite(total).all():
                bounds = power_bound(total, prefix[i, :, :-1], math.log(errors[i]), start)
                upper[i] = min(upper[i], bounds.max())
        if (upper <= np.maximum(lower, 0.0) * (1.0 + plan.rtol)).all():
            break
    return [Iterate(max(low, 0.0), high, steps) for low, high in zip(lower.tolist(), upper.tolist(), strict=True)]
