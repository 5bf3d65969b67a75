"""Products of masked norms over balls of inputs, for networks too large for :mod:`fastlip.lipschitz._ball_graph`.

Where interval arithmetic knows the slopes of an activation to be at most K on a ball, elementwise, the layer behind it
contributes ||A diag(K)|| in place of ||A||: for ReLU, units that stay inactive drop their columns (Y. Huang, H. Zhang,
Y. Shi, J. Z. Kolter and A. Anandkumar, "Training certifiably robust neural networks with efficient local Lipschitz
bounds", NeurIPS 2021). All balls are iterated together: each step applies the layer once, to the masked vectors of all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz._ball_pass import BallPass, Balls, NotApplicable, fits, is_layer
from fastlip.lipschitz._combinations import Concatenation, Sum, Weighted
from fastlip.lipschitz._domain import stacked
from fastlip.lipschitz._graph import Traced
from fastlip.lipschitz._intervals import Interval, as_rows, up
from fastlip.lipschitz._registry import Diagonal
from fastlip.lipschitz._slopes import slope_bounds
from fastlip.lipschitz._steps import Step
from fastlip.norms import Masked, NormInterval, Operator, diagonal_norm, operator_norms
from fastlip.norms._operators.modules import TRANSPOSED
from fastlip.norms._options import ResolvedOptions

#: Least relative width of masked norms: there are as many as samples.
_RTOL = 0.05
#: Least and largest maximum of weights that are iterated as they are: masked operators are not normalised.
_ORDINARY = (1e-6, 1e6)


@dataclass(frozen=True, eq=False)
class _State:
    """What is known of a step's output on each ball.

    Attributes:
        value: bounds of its values on the balls and, in the second half of the rows, at their centres.
        total: bounds on the constants from the model's input, [B], before ``mask``.
        mask: what the Jacobian's rows are multiplied by at most since, [B, *shape]; None for 1.
    """

    value: Interval
    total: Tensor
    mask: Tensor | None = None

    @property
    def constant(self) -> Tensor:
        """Bounds on the constants from the model's input, [B]."""
        if self.mask is None:
            return self.total
        largest = as_rows(self.mask)
        return up(self.total * (largest.amax(1) if largest.shape[1] else 0.0))


def masked_products(traced: Traced, balls: Balls, options: ResolvedOptions) -> tuple[Tensor, float]:
    """Upper bounds on the Lipschitz constants on the balls, [B] float64, and the confidence that all of them hold.

    Args:
        traced: the graph of a model in float64, in eval mode, without folded scales.
        balls: the balls.
        options: how to compute norms.

    Raises:
        NotApplicable: a step's constant depends on more than one mask.
    """
    return _Pass(traced, balls, options).run_balls()


class _Pass(BallPass[_State]):
    """One pass through the graph, with twice as many rows as samples: for the balls and their centres."""

    def __init__(self, traced: Traced, balls: Balls, options: ResolvedOptions) -> None:
        super().__init__(traced, balls, 2 * len(balls.x))
        layers = sum(isinstance(step.factor, Operator) for step in traced.steps.values())
        # Each layer has start vectors of its own, and an equal share of the probability of failure for all samples.
        self._share = (1.0 - options.confidence) / max(layers, 1)
        self._options = replace(options, rtol=max(options.rtol, _RTOL), progress=None)
        self._failure = 0.0
        self._scaled: set[Step] = set()

    def run_balls(self) -> tuple[Tensor, float]:
        last = self.run_to_last()
        return last.constant, max(0.0, 1.0 - self._failure)

    def first(self) -> _State:
        x = self.balls.x
        return _State(stacked([self.balls.interval(), Interval(x, x)]), torch.ones_like(self.balls.radius))

    def follow(self, n: fx.Node, step: Step, sources: Sequence[fx.Node]) -> _State:
        args, kwargs = self.arguments(n, lambda state: state.value)
        known = step.interval(*args, **kwargs) if step.interval is not None else None
        x = self.balls.x
        if known is None or tuple(known.lower.shape) != (2 * len(x), *step.shape):
            known = Interval.unbounded(step.shape, 2 * len(x), x.device)
        return self._sharpened(step, self._followed(n, step, [self.states[a] for a in sources], known))

    def _sharpened(self, step: Step, state: _State) -> _State:
        """No value is further from that at the centre than the constant times the radius."""
        if step in self._scaled:  # its constant contains the factors of the next step
            return state
        count = len(self.balls.x)
        ball, centre = (state.value.rows(part) for part in (slice(count), slice(count, None)))
        moved = up(state.constant * self.balls.l2_radius()).nan_to_num(nan=math.inf)
        return replace(state, value=stacked([ball.intersection(centre.widened(moved)), centre]))

    def _followed(self, n: fx.Node, step: Step, sources: Sequence[_State], value: Interval) -> _State:
        first, factor = sources[0], step.factor
        if isinstance(factor, Sum) and all(source.shape == step.shape for source in step.inputs):
            # An operand may appear twice, as in x + x.
            terms = [self.states[a].constant for a in n.args if a in self.states]  # type: ignore[index]
            return _State(value, up(torch.stack(terms).sum(0) * (1.0 + 1e-14)))
        if isinstance(factor, Concatenation):
            constants = {self.traced.steps[a]: state.constant for a, state in self.states.items()}
            several = torch.stack([constants[source] for source in step.inputs])
            return _State(value, up(torch.linalg.vector_norm(several, dim=0) * (1.0 + 1e-14)))
        if isinstance(factor, Weighted):
            rows = slice(len(self.balls.x))
            terms = [up(state.constant * weight) for state, weight in self.weights(step, lambda s: s.value.rows(rows))]
            total = torch.stack(terms).nan_to_num(nan=math.inf).sum(0)
            return _State(value, up(total * (1.0 + 1e-14)))
        if len(sources) != 1 or not isinstance(factor, (int, float, NormInterval, Operator, Diagonal)):
            raise NotApplicable(f"{step.name} depends on more than one mask")
        if isinstance(factor, Operator):
            return self._through_layer(step, factor, first, value)
        if isinstance(factor, NormInterval):
            self._failure += 1.0 - factor.confidence
            return _State(value, up(first.constant * factor.upper))
        if isinstance(factor, Diagonal):
            if step.inputs[0] in self._scaled:
                return _State(value, first.total)
            if not step.exact:
                return _State(value, up(first.constant * diagonal_norm(factor.scale)))
            return _State(value, first.total, self._masked(step, first, _by_channel(factor, step).abs()))
        if step.places is not None:
            if first.mask is None:
                return _State(value, first.total)
            moved = as_rows(first.mask)[:, step.places().to(first.mask.device)]
            return _State(value, first.total, moved.view(-1, *step.shape))
        if step.module is not None:
            count = len(self.balls.x)
            known = first.value.rows(slice(count))
            slopes = slope_bounds(step.module, known)
            if slopes is not None:
                return _State(value, first.total, self._masked(step, first, torch.maximum(-slopes[0], slopes[1])))
        return _State(value, up(first.constant * float(factor)))

    def _masked(self, step: Step, source: _State, mask: Tensor) -> Tensor:
        mask = up(mask.expand(len(self.balls.x), *step.shape))
        return mask if source.mask is None else up(mask * source.mask)

    def _through_layer(self, step: Step, layer: Operator, source: _State, value: Interval) -> _State:
        after = step.users[0] if len(step.users) == 1 else None
        scale = None
        if after is not None and isinstance(after.factor, Diagonal) and after.exact and is_layer(step):
            scale = _by_channel(after.factor, after)
            self._scaled.add(step)
        transposed = isinstance(step.module, TRANSPOSED)
        matches = is_layer(step) and fits(step, layer) and source.mask is not None and source.mask[0].numel() > 0
        ordinary = _ORDINARY[0] <= layer.weight.detach().abs().max().item() <= _ORDINARY[1]
        if not matches or not ordinary or source.mask is None:
            return _State(value, up(source.constant * self._norm(layer, scale)))
        # Scaled to 1, as masked operators are not normalised.
        size = as_rows(source.mask).amax(1).clamp_min(1e-300)
        masks = source.mask / size.view(-1, *(1,) * (source.mask.dim() - 1))
        ends = None if scale is None else scale.expand(step.shape)
        ops = [Masked(layer, ends, mask) if transposed else Masked(layer, mask, ends) for mask in masks]
        norm = torch.tensor(self._bounded(ops, self._share), dtype=torch.float64, device=size.device)
        # Rounding the masks to 1 changes them by a unit.
        return _State(value, up(source.total * size * norm * (1.0 + 1e-14)))

    def _norm(self, layer: Operator, scale: Tensor | None) -> float:
        """The norm of a layer without a mask."""
        outer = 1.0 if scale is None else scale.abs().amax().item()
        return self._bounded([layer], self._share)[0] * outer * (1.0 + 1e-14)

    def _bounded(self, ops: list[Any], failure: float) -> list[float]:
        found = operator_norms(ops, replace(self._options, confidence=1.0 - failure))
        if any(interval.confidence < 1.0 for interval in found):
            self._failure += failure
        return [interval.upper for interval in found]


def _by_channel(factor: Diagonal, step: Step) -> Tensor:
    """Factors against [*shape] of the step."""
    return factor.scale.double().view(-1, *(1,) * (len(step.shape) - 1))
