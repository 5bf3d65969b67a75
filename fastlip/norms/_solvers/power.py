"""Power iteration on A^T A with Dixon's certificate, in float64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastlip.norms._operators.composed import AnyOperator
from fastlip.norms._solvers.batched_operator import BatchedOperator, batched_operator
from fastlip.norms._solvers.certificate import Array, power_bound, start_overlap
from fastlip.norms._solvers.cuda_graphs import Replayed, Runner, worthwhile
from fastlip.norms._solvers.float64_rounding import rounding_terms
from fastlip.norms._solvers.iteration_config import IterationConfig, IterationResult
from fastlip.norms._solvers.start_vectors import draw_starts, on_device

#: Steps between two stopping tests.
_TEST_EVERY = 10
#: Steps over those at the last bound for another bound: each takes all steps so far into account, and late ones differ
#: little.
_SPACING = 1.05


def power_norms(ops: Sequence[AnyOperator], config: IterationConfig) -> list[IterationResult]:
    """Intervals of operators of one kind; each upper side fails with probability at most ``config.eta``.

    The certificate holds for every number of steps at once, so an operator stops at the first test that meets
    ``rtol``. Tests are further apart the more steps were taken.
    """
    config = replace(config, dtype=torch.float64)
    operators, b = batched_operator(ops, config.starts, config.dtype), config.starts
    config = on_device(config, operators.device)
    sizes = [math.prod(op.input_shape) for op in ops]
    starts, moved = draw_starts(sizes, config, operators.device)
    events = np.array([start_overlap(size, config.eta, b) for size in sizes]) - moved.cpu().numpy()
    overlaps = np.maximum(events, 0.0)
    relative, slack, magnitudes = rounding_terms(ops, np.array(sizes))
    # One application of A^T A, and the scaling before it, on vectors of norm at most 1 + relative.
    errors = 2.02 * (slack * magnitudes + relative * magnitudes**2)
    run = _Steps(operators, starts)
    prefix = np.zeros((len(ops), b, 1))
    lower, upper, steps = np.zeros(len(ops)), np.full(len(ops), math.inf), np.zeros(len(ops), dtype=int)
    on = np.ones(len(ops), dtype=bool)
    done = tested = 0
    while on.any():
        count = min(_TEST_EVERY, config.max_steps - done)
        stretched, grown = run.advance(count)
        for stretch, growth in zip(stretched.reshape(count, -1, b), grown.reshape(count, -1, b, 1), strict=True):
            # The vectors have norm 1 up to `relative`.
            reached = (stretch.max(axis=1) - 1.01 * slack) * (1.0 - 2.0 * relative)
            lower[on] = np.maximum(lower, reached)[on]
            with np.errstate(divide="ignore"):
                logs = 0.5 * np.log(growth)
            prefix = np.concatenate([prefix, prefix[..., -1:] + logs], axis=2)
        done += count
        steps[on] = done
        total = prefix[:, :, -1] + relative[:, None]
        which = np.flatnonzero(on & (overlaps > 0.0) & np.isfinite(total).all(axis=1))
        if len(which) and (done >= _SPACING * tested or done == config.max_steps):
            tested = done
            numbers = [array[which].repeat(b) for array in (np.log(errors), overlaps)]
            before = prefix[which, :, :-1].reshape(len(which) * b, -1)
            bounds = power_bound(total[which].ravel(), before, numbers[0], numbers[1])
            upper[which] = np.minimum(upper[which], bounds.reshape(-1, b).max(axis=1))
        on &= (upper > lower * (1.0 + config.rtol)) & (done < config.max_steps)
        run.active.copy_(torch.from_numpy(on))
    found = zip(np.maximum(lower, 0.0).tolist(), upper.tolist(), steps.tolist(), strict=True)
    return [IterationResult(*interval) for interval in found]


class _Steps:
    """v <- A^T A v / ||v|| from every start vector, on fixed memory.

    Attributes:
        active: operators that take part, [operators] bool; written in place.
    """

    def __init__(self, operators: BatchedOperator, starts: Tensor) -> None:
        self._operators, self._w = operators, starts
        self.active = torch.ones(len(operators.vectors), dtype=torch.bool, device=starts.device)
        self._u = starts.new_empty(operators.range[-1].stop)
        # Squares of u and the next w, one row per step; each chunk begins with the last w of the one before.
        self._squares = torch.ones(
            _TEST_EVERY, 2, operators.vectors[-1].stop, dtype=torch.float64, device=starts.device
        )
        self._before = torch.ones_like(self._squares[0, 1])
        self._runner: Runner | None = None
        if worthwhile(starts.device, starts.numel() + self._u.numel()):
            self._runner = Replayed(starts.device)

    def _chunk(self, count: int) -> None:
        square = self._before
        for u_square, w_square in self._squares[:count]:
            self._operators.forward(self._w, self._u, u_square, x_square=square, active=self.active)
            self._operators.adjoint(self._u, self._w, w_square, active=self.active)
            square = w_square
        self._before.copy_(square)

    def advance(self, count: int) -> tuple[Array, Array]:
        """Norms of A v / ||v|| and squared norms of A^T A v / ||v|| in ``count`` steps each.

        Both are [count, operators * starts].
        """
        if self._runner is not None and count == _TEST_EVERY:
            self._runner(lambda: self._chunk(count))
        else:
            self._chunk(count)
        squares = self._squares[:count].cpu().numpy()
        return np.sqrt(squares[:, 0]), squares[:, 1]
