"""Jacobians over balls of inputs: a pass through the graph for a batch of balls at once.

Each step's output is an affine map of the input, plus what the open units do, whose slopes are not the same all over
the ball: a matrix of columns, one for each element of the input and one for each open unit. Activations multiply it by
the middle of each element's slopes, and add the columns of their own open units. The same columns bound the values, as
a zonotope (G. Singh et al., "Fast and effective robustness certification", NeurIPS 2018), which together with interval
arithmetic say how far slopes range. At the end :mod:`fastlip.lipschitz._gain` bounds the Jacobian.

Steps that are neither affine nor activations start anew: what leaves them is the input of what follows, and constants
multiply.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._ball_pass import BallPass, Balls, NotApplicable, fits, is_layer
from fastlip.lipschitz._broadcast import copies
from fastlip.lipschitz._combinations import Combination, Weighted
from fastlip.lipschitz._gain import OpenUnits, largest_norm
from fastlip.lipschitz._graph import Traced
from fastlip.lipschitz._interval_arithmetic import module_interval, softplus_jump
from fastlip.lipschitz._intervals import EPS, INF, TINY, Interval, as_rows, up
from fastlip.lipschitz._registry import Diagonal
from fastlip.lipschitz._slopes import slope_bounds
from fastlip.lipschitz._steps import Step, in_graph, in_sample
from fastlip.norms import NormInterval, Operator, diagonal_norm
from fastlip.norms._models.layer_output import apply_operator
from fastlip.norms._operators.batchnorm import BATCHNORMS
from fastlip.norms._operators.modules import TRANSPOSED
from fastlip.norms._solvers.float64_rounding import reduction_length

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACT = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
#: Relative error of a few operations.
_FEW = 16.0 * EPS


@dataclass(frozen=True, eq=False)
class _State:
    """What is known of a step's output on each ball.

    Attributes:
        value: bounds of its values.
        centre: the affine map's value at the centre, [B, *shape].
        columns: the affine map's matrix, [B, n, *shape]: n elements of the input and open units.
        centre_error: bound on the L2 norm of the rounding error of ``centre``, [B].
        error: bounds on the L2 norms of those of ``columns``, [B, n].
        last: the elements whose unit vectors the last columns are, [B, P]; their number for a column of zeros. None
            where that is not known.
    """

    value: Interval
    centre: Tensor
    columns: Tensor
    centre_error: Tensor
    error: Tensor
    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Block:
    """The open units of one activation, at most P of them in each sample.

    Attributes:
        rows: gradients of their arguments, in terms of the columns there were, [B, P, n].
        delta: half-widths of their slopes, [B, P]; 0 where a sample has fewer.
        noise: what they can add to the affine map, at most, [B, P].
        reach: bounds on the norms of the gradients, [B, P].
        error: bounds on the L2 norms of the rounding errors of the columns of ``rows``, [B, n].
    """

    rows: Tensor
    delta: Tensor
    noise: Tensor
    reach: Tensor
    error: Tensor


def jacobian_norms(traced: Traced, balls: Balls, most: int) -> Tensor:
    """Upper bounds on the norms of the Jacobians on the balls, [B] float64; inf where none was found.

    Args:
        traced: the graph of a model in float64, in eval mode, without folded scales.
        balls: the balls.
        most: largest number of elements that the columns of a step may have.

    Raises:
        NotApplicable: this way does not work for this graph.
    """
    return _Pass(traced, balls, most).run_balls()


class _Pass(BallPass[_State]):
    """One pass through the graph."""

    def __init__(self, traced: Traced, balls: Balls, most: int) -> None:
        super().__init__(traced, balls, len(balls.x))
        self._most = most
        #: What the constants of all that was passed before multiply to.
        self._before = torch.ones_like(balls.radius)
        self._begin(as_rows(balls.x).shape[1])

    def run_balls(self) -> Tensor:
        last = self.run_to_last()
        return up(self._before * self._gain(last))

    def _begin(self, inputs: int) -> None:
        """Forget all units, before a first state of as many inputs."""
        self._inputs, self._blocks = inputs, list[_Block]()
        #: Half-widths of the inputs where they are bounds of each, [B, inputs]; None where they are the balls.
        self._widths: Tensor | None = None

    def first(self) -> _State:
        return self._first(self.balls.x, self.balls.interval())

    def follow(self, n: fx.Node, step: Step, sources: Sequence[fx.Node]) -> _State:
        state = self._followed(n, step, sources)
        shape = (len(self.balls.x), *step.shape)
        if tuple(state.centre.shape) != shape or tuple(state.value.lower.shape) != shape:
            raise NotApplicable("a step that mixes the batch axis into others")
        if n in self.traced.steps:
            for source in sources:  # no longer needed
                if all(user is n or user in self.env for user in source.users):
                    self.states[source] = replace(self.states[source], columns=state.columns[:, :0])
        return state

    # -- states -------------------------------------------------------------------------------------------------------

    def _first(self, x: Tensor, value: Interval) -> _State:
        count = as_rows(x).shape[1]
        self._require_room(count, x.shape[1:])
        columns = torch.eye(count, dtype=torch.float64, device=x.device).view(1, count, *x.shape[1:])
        zeros = torch.zeros_like(self.balls.radius)
        return _State(value, x, columns.expand(len(x), *columns.shape[1:]), zeros, zeros[:, None].expand(-1, count))

    def _require_room(self, columns: int, shape: tuple[int, ...]) -> None:
        if columns * math.prod(shape) * len(self.balls.x) > self._most:
            raise NotApplicable("more columns than fit")

    def _followed(self, n: fx.Node, step: Step, sources: Sequence[fx.Node]) -> _State:
        args, kwargs = self.arguments(n, lambda state: state.value)
        value = step.interval(*args, **kwargs) if step.interval is not None else None
        if value is None:
            value = Interval.unbounded(step.shape, len(self.balls.x), self.balls.x.device)
        first = self.states[sources[0]]
        if len(sources) == 1 and isinstance(step.factor, Operator) and is_layer(step) and fits(step, step.factor):
            return self._through_layer(step, step.factor, first, value)
        if len(sources) == 1 and isinstance(step.factor, Diagonal) and step.exact:
            return self._scaled(n, step, step.factor.scale, first, value)
        if len(sources) == 1 and step.linear:
            return self._linear(n, step, first, value)
        if n.target in (*_ADD, *_SUBTRACT) and not n.kwargs and all(s.alone for s in (step, *step.inputs)):
            return self._sum(n, step, value)
        if step.kind in ("cat", "concat", "concatenate") and n.kwargs.keys() <= {"dim"} and len(n.args) >= 1:
            return self._concatenated(n, step, value)
        if len(sources) == 1 and step.module is not None:
            known = self._sharpened(first)
            slopes = slope_bounds(step.module, known)
            if slopes is not None:
                return self._activated(n, step, first, known, slopes, value)
        return self._anew(n, step, sources, value)

    def _through_layer(self, step: Step, layer: Operator, source: _State, value: Interval) -> _State:
        transposed = isinstance(step.module, TRANSPOSED)
        self._require_room(source.columns.shape[1], step.shape)
        columns = _columns_through(layer, source, transposed)
        bias: Tensor | None = getattr(step.module, "bias", None)
        centre = apply_operator(layer, source.centre, bias, transposed=transposed)
        relative = 1.01 * (reduction_length(layer) + 4) * EPS
        size = layer.absolute_bound
        offset = 4.0 * EPS * _frobenius(centre)
        if bias is not None:
            matrix = not layer.kernel and layer.groups == 1
            offset = offset + relative * _frobenius(
                bias if matrix else bias.view(-1, *(1,) * (len(step.shape) - 1)), centre
            )
        return _State(
            value,
            centre,
            columns,
            up(size * (source.centre_error + relative * _frobenius(source.centre)) * (1.0 + _FEW) + offset),
            up(size * (source.error + relative * _lengths(source.columns)) * (1.0 + _FEW)),
        )

    def _scaled(self, n: fx.Node, step: Step, scale: Tensor, source: _State, value: Interval) -> _State:
        """A factor for each channel, and an offset."""
        by_channel = scale.to(source.centre).view(-1, *(1,) * (len(step.shape) - 1))
        centre = self._apply(n, step, source.centre)
        size = diagonal_norm(scale)
        offset = _frobenius(centre) + size * _frobenius(source.centre)
        if isinstance(step.module, BATCHNORMS):
            mean: Tensor = step.module.running_mean  # type: ignore[assignment]
            offset = offset + size * _frobenius(mean.view(by_channel.shape), centre)
        return _State(
            value,
            centre,
            source.columns * by_channel,
            up(size * source.centre_error + _FEW * offset),
            up(size * (source.error + _FEW * _lengths(source.columns))),
        )

    def _linear(self, n: fx.Node, step: Step, source: _State, value: Interval) -> _State:
        assert isinstance(step.factor, (int, float))
        self._require_room(source.columns.shape[1], step.shape)
        columns = self._apply(n, step, source.columns.flatten(0, 1)).unflatten(0, source.columns.shape[:2])
        centre = self._apply(n, step, source.centre)
        # The coefficients are all of one sign, or there is one in each row, so that the norm is that of their
        # magnitudes; an element is a sum of at most as many products as there are.
        size = float(step.factor)
        relative = 1.01 * (math.prod(step.inputs[0].shape) + 4) * EPS
        return _State(
            value,
            centre,
            columns,
            up(size * (source.centre_error + relative * _frobenius(source.centre)) * (1.0 + _FEW)),
            up(size * (source.error + relative * _lengths(source.columns)) * (1.0 + _FEW)),
        )

    def _apply(self, n: fx.Node, step: Step, t: Tensor) -> Tensor:
        """The step on samples [R, *shape] in place of its only traced argument, [R, *other shape]."""
        if step.places is not None:
            return as_rows(t)[:, step.places().to(t.device)].view(-1, *step.shape)

        def on_one(sample: Tensor) -> Tensor:
            given = in_graph(sample[None], step.inputs[0], 1)
            args, kwargs = self.arguments(n, lambda state: given)
            return in_sample(step.apply(*args, **kwargs), step)[0]

        return torch.func.vmap(on_one)(t)

    def _sum(self, n: fx.Node, step: Step, value: Interval) -> _State:
        """A sum or difference of traced tensors, or of one and a constant, broadcast to the shape of the output."""
        signs = (1.0, -1.0 if n.target in _SUBTRACT else 1.0)
        terms = [
            (_broadcast(self.states[a], step.shape), s)  # type: ignore[index]
            for a, s in zip(n.args, signs, strict=True)
            if a in self.states
        ]
        width = max(state.columns.shape[1] for state, _ in terms)
        self._require_room(width, step.shape)
        columns = sum(sign * _widened(state.columns, width) for state, sign in terms)
        args, _ = self.arguments(n, lambda state: _broadcast(state, step.shape).centre)
        centre = step.apply(*args)
        assert isinstance(columns, Tensor)
        sizes = [_frobenius(state.centre) for state, _ in terms]
        lost = _FEW * (_frobenius(centre) + sum(sizes))
        return _State(
            value,
            centre,
            columns,
            up(sum((state.centre_error for state, _ in terms), lost)),
            up(sum((_widened(state.error, width) for state, _ in terms), _FEW * _lengths(columns)) * (1.0 + _FEW)),
        )

    def _concatenated(self, n: fx.Node, step: Step, value: Interval) -> _State:
        parts: Any = n.args[0]
        dim = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
        axis = dim % (len(step.shape) + 1) if isinstance(dim, int) else 0
        if axis == 0 or not all(a in self.states for a in parts):
            return self._anew(n, step, [a for a in n.all_input_nodes if a in self.states], value)
        states = [self.states[a] for a in parts]
        width = max(state.columns.shape[1] for state in states)
        return _State(
            value,
            torch.cat([state.centre for state in states], axis),
            torch.cat([_widened(state.columns, width) for state in states], axis + 1),
            up(_root_of_squares([state.centre_error for state in states])),
            up(_root_of_squares([_widened(state.error, width) for state in states])),
        )

    # -- activations --------------------------------------------------------------------------------------------------

    def _radii(self, columns: Tensor) -> Tensor:
        """How far the inputs' columns can move each element, [B, *shape]."""
        inputs = columns[:, : self._inputs]
        rows = (-1, *(1,) * (columns.dim() - 2))
        if self._widths is not None:
            return torch.einsum("bn,bn...->b...", self._widths, inputs.abs()) * (1.0 + EPS * (self._inputs + 8)) + TINY
        length = inputs.norm(dim=1) if self.balls.norm == "l2" else inputs.abs().sum(1)
        return length * self.balls.radius.view(rows) * (1.0 + EPS * (self._inputs + 8)) + TINY

    def _noise(self, width: int) -> Tensor:
        """What each unit of the first ``width`` columns can add, [B, units]."""
        noise = [block.noise for block in self._blocks]
        given = torch.cat(noise, 1) if noise else self.balls.x.new_zeros(len(self.balls.x), 0)
        return given[:, : width - self._inputs]

    def _sharpened(self, source: _State) -> Interval:
        """Bounds of the source's values, by interval arithmetic and by its affine map."""
        noise = self._noise(source.columns.shape[1])
        units = source.columns[:, self._inputs :].abs()
        spread = torch.einsum("bn,bn...->b...", noise, units) * (1.0 + EPS * (noise.shape[1] + 8))
        if self._widths is not None:
            reach = torch.linalg.vector_norm(self._widths, dim=1)
        else:
            reach = self.balls.radius * (1.0 if self.balls.norm == "l2" else math.sqrt(self._inputs))
        moved = reach * torch.linalg.vector_norm(source.error[:, : self._inputs], dim=1)
        lost = source.centre_error + (moved + (source.error[:, self._inputs :] * noise).sum(1)) * (1.0 + 1e-9)
        spread = spread + self._radii(source.columns) + lost.view(-1, *(1,) * (spread.dim() - 1))
        spread = spread * (1.0 + _FEW) + TINY
        affine = Interval(source.centre - up(spread), source.centre + up(spread))
        return source.value.intersection(Interval(affine.lower - TINY, affine.upper + TINY))

    def _activated(
        self, n: fx.Node, step: Step, source: _State, known: Interval, slopes: tuple[Tensor, Tensor], value: Interval
    ) -> _State:
        low, high = slopes
        module = step.module
        assert module is not None
        middle = 0.5 * (low + high)
        delta = torch.maximum(high - middle, middle - low)
        delta = torch.where(delta > 0.0, up(delta), 0.0)
        # f(z) - m z lies within these bounds: of its values at both ends and at 0, if it is linear between, or of that
        # in the middle, from which it differs by at most delta times the distance.
        centre, radius = known.centre_and_radius()
        at = _values(module, centre) - middle * centre
        slack = _FEW * (centre.abs() * (1.0 + middle.abs()) + _values(module, centre).abs()) + TINY
        if isinstance(module, nn.Softplus):
            slack = slack + softplus_jump(module)
        half = torch.where(delta > 0.0, delta * radius, 0.0) + slack
        if type(module) is nn.ReLU:
            # With slopes 0 and 1 it is |z| / 2 where m is 1/2.
            reach = torch.maximum(-known.lower, known.upper)
            opened = delta > 0.0
            half = torch.where(opened, 0.25 * reach * (1.0 + _FEW), 0.0)
            at = torch.where(opened, 0.25 * reach, 0.0)
        rows = (len(at), 1, *at.shape[1:])
        columns = source.columns * middle.view(rows)
        widest = as_rows(middle).abs().amax(1) if middle[0].numel() else torch.zeros_like(source.centre_error)
        state = _State(
            _through(module, known, value),
            middle * source.centre + at,
            columns,
            up(widest * source.centre_error + _FEW * (_frobenius(source.centre) * widest + _frobenius(at))),
            up(widest[:, None] * source.error + _FEW * _lengths(columns)),
        )
        return self._with_units(state, source, delta, half)

    def _with_units(self, state: _State, source: _State, delta: Tensor, half: Tensor) -> _State:
        """Add the open units of an activation: their rows are those of its source, their columns unit vectors."""
        batch = len(delta)
        flat, half = as_rows(delta), as_rows(half)
        opened = flat > 0.0
        # Rounding alone separates the others from the affine map.
        lost = torch.linalg.vector_norm(torch.where(opened, 0.0, half), dim=1) * (1.0 + 1e-9)
        state = replace(state, centre_error=up(state.centre_error + lost))
        count = int(opened.sum(1).max())
        width = self._inputs + sum(block.delta.shape[1] for block in self._blocks)
        if not count:
            return state
        self._require_room(width + count, state.centre.shape[1:])
        order = opened.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        chosen = opened.gather(1, order)
        rows = _elements(source.columns)
        rows = rows.gather(2, order[:, None].expand(-1, rows.shape[1], -1)).mT * chosen[..., None]
        own = torch.where(chosen, flat.gather(1, order), 0.0)
        noise = torch.where(chosen, half.gather(1, order), 0.0)
        reach = torch.linalg.vector_norm(rows[..., : self._inputs], dim=2)
        reaches = [block.reach * block.delta for block in self._blocks]
        if reaches:
            before = torch.cat(reaches, 1)[:, : rows.shape[2] - self._inputs]
            reach = reach + (rows[..., self._inputs :].abs() @ before[..., None])[..., 0]
        self._blocks.append(_Block(rows, own, noise, reach, source.error))
        units = rows.new_zeros(batch, count, flat.shape[1]).scatter_(2, order[..., None], chosen.double()[..., None])
        columns = torch.cat([_widened(state.columns, width), units.view(batch, count, *state.centre.shape[1:])], 1)
        last = torch.where(chosen, order, flat.shape[1])
        return replace(state, columns=columns, error=_widened(state.error, width + count), last=last)

    # -- the rest -----------------------------------------------------------------------------------------------------

    def _anew(self, n: fx.Node, step: Step, sources: Sequence[fx.Node], value: Interval) -> _State:
        """Multiply the constant of all before with the step's, and go on from what leaves it as a new input."""
        alive = [
            node
            for node in (*self.states, *self.bundles)
            if node not in sources and any(user not in self.env and user is not n for user in node.users)
        ]
        again = any(user is not n and user not in self.env for source in sources for user in source.users)
        weighted = isinstance(step.factor, Weighted)
        several = len(sources) != 1 or isinstance(step.factor, Combination)
        if alive or again or n in self.traced.bundles or (several and not weighted):
            raise NotApplicable(f"{step.name} is neither affine nor an activation")
        if weighted:
            terms = [up(self._gain(state) * weight) for state, weight in self.weights(step, self._sharpened)]
            gain = up(torch.stack(terms).nan_to_num(nan=INF).sum(0) * (1.0 + len(terms) * EPS))
        else:
            factor = step.factor
            if isinstance(factor, NormInterval):
                factor = factor.upper if factor.confidence == 1.0 else INF
            elif isinstance(factor, Operator):
                factor = factor.absolute_bound
            elif isinstance(factor, Diagonal):
                factor = diagonal_norm(factor.scale)
            assert isinstance(factor, (int, float))
            gain = up(self._gain(self.states[sources[0]]) * float(factor))
        self._before = up(self._before * gain)
        centre, radius = value.centre_and_radius()
        self._begin(math.prod(step.shape))
        self._widths = as_rows(radius)
        return self._first(centre, value)

    def _gain(self, state: _State) -> Tensor:
        """Upper bounds on the norms of the Jacobians from the last new input to a state, [B]."""
        width = self._inputs + sum(block.delta.shape[1] for block in self._blocks)
        outer, error = _elements(_widened(state.columns, width)).mT, _widened(state.error, width)
        some = self._blocks
        nothing = outer.new_zeros(len(outer), 0, width)
        inner = torch.cat([_widened(block.rows.mT, width).mT for block in some], 1) if some else nothing
        counts = [block.delta.shape[1] for block in some]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        zeros = outer.new_zeros(len(outer), 0)

        def joined(field: Callable[[_Block], Tensor]) -> Tensor:
            return torch.cat([field(block) for block in some], 1) if some else zeros

        return largest_norm(
            OpenUnits(
                outer[..., : self._inputs],
                outer[..., self._inputs :],
                inner[..., self._inputs :],
                inner[..., : self._inputs],
                joined(lambda block: block.delta),
                joined(lambda block: block.reach),
                [slice(end - count, end) for end, count in zip(ends, counts, strict=True)],
                error,
                torch.stack([_widened(block.error, width) for block in some], 1) if some else nothing,
            )
        )


def _columns_through(layer: Operator, source: _State, transposed: bool) -> Tensor:
    """A layer's output for the columns of its source, [B, n, *shape]."""
    given, last = source.columns, source.last
    if not given.stride(0):  # those of the input are the same in all samples
        columns = apply_operator(layer, given[0], transposed=transposed)
        return columns.expand(len(given), *columns.shape)
    elements = math.prod(given.shape[2:])
    if last is None or last.numel() <= elements:
        return apply_operator(layer, given.flatten(0, 1), transposed=transposed).unflatten(0, given.shape[:2])
    # Each unit vector is sent through the layer once.
    dense = given[:, : given.shape[1] - last.shape[1]]
    units = torch.eye(elements + 1, elements, dtype=given.dtype, device=given.device).view(-1, *given.shape[2:])
    through = apply_operator(layer, torch.cat([dense.flatten(0, 1), units]), transposed=transposed)
    own, of_units = through.split([dense.shape[0] * dense.shape[1], len(units)])
    return torch.cat([own.unflatten(0, dense.shape[:2]), of_units[last]], 1)


def _broadcast(state: _State, shape: tuple[int, ...]) -> _State:
    """The affine map to a larger shape of samples; bounds of the values stay those of the smaller one."""
    own = state.centre.shape[1:]
    if own == shape:
        return state
    ones, times = (1,) * (len(shape) - len(own)), copies(own, shape)
    batch, count = state.columns.shape[:2]
    return replace(
        state,
        centre=state.centre.reshape(batch, *ones, *own).expand(batch, *shape),
        columns=state.columns.reshape(batch, count, *ones, *own).expand(batch, count, *shape),
        centre_error=up(times * state.centre_error),
        error=up(times * state.error),
    )


def _values(module: nn.Module, t: Tensor) -> Tensor:
    """An activation's values."""
    if type(module) is nn.PReLU:
        return torch.nn.functional.prelu(t, module.weight.detach().double())
    return type(module).forward(module, t.clone())


def _through(module: nn.Module, known: Interval, value: Interval) -> Interval:
    """Bounds of an activation's values, from the sharper bounds of its argument as well."""
    sharper = module_interval(module, known)
    return value if sharper is None else value.intersection(sharper)


def _widened(columns: Tensor, width: int) -> Tensor:
    """Columns with zeros for the units that came later."""
    missing = width - columns.shape[1]
    if not missing:
        return columns
    return torch.cat([columns, columns.new_zeros(len(columns), missing, *columns.shape[2:])], 1)


def _elements(columns: Tensor) -> Tensor:
    """Columns [B, n, *shape] as [B, n, elements]; the shape of a sample may be empty."""
    return columns.flatten(2) if columns.dim() > 2 else columns[..., None]


def _frobenius(t: Tensor, like: Tensor | None = None) -> Tensor:
    """Upper bounds on the L2 norms of the samples' elements, [B], of t where it broadcasts to ``like``."""
    flat = as_rows(t if like is None else t.detach().double().broadcast_to(like.shape))
    return torch.linalg.vector_norm(flat, dim=1) * (1.0 + EPS * (flat.shape[1] + 8)) + TINY


def _lengths(columns: Tensor) -> Tensor:
    """Upper bounds on the L2 norms of columns, [B, n]."""
    flat = _elements(columns)
    return torch.linalg.vector_norm(flat, dim=2) * (1.0 + EPS * (flat.shape[2] + 8)) + TINY


def _root_of_squares(values: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(values), dim=0) * (1.0 + _FEW)
