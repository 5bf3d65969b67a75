"""Passes through a graph for a batch of balls of inputs at once, as :mod:`fastlip.lipschitz._ball_graph` makes one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx

from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._graph import Traced
from fastlip.lipschitz._intervals import EPS, INF, Interval, up
from fastlip.lipschitz._registry import find_rule
from fastlip.lipschitz._rules.layers import weighted
from fastlip.lipschitz._steps import Step
from fastlip.norms import Operator
from fastlip.norms._operators.modules import TRANSPOSED

State = TypeVar("State")


class NotApplicable(Exception):
    """This kind of pass gives no bound for a graph."""


@dataclass(frozen=True, eq=False)
class Balls:
    """Balls around samples.

    Attributes:
        x: centres, [B, *shape] float64.
        radius: [B] float64.
        norm: "l2" or "linf".
    """

    x: Tensor
    radius: Tensor
    norm: str

    def interval(self) -> Interval:
        """Bounds of each ball."""
        make = Interval.l2_ball if self.norm == "l2" else Interval.linf_ball
        return make(self.x, self.radius)

    def l2_radius(self) -> Tensor:
        """Largest L2 distance of a point of each ball from its centre, [B]."""
        if self.norm == "l2":
            return self.radius
        return up(self.radius * (math.sqrt(math.prod(self.x.shape[1:])) * (1.0 + EPS)))


class BallPass(fx.Interpreter, ABC, Generic[State]):
    """A pass that finds a state for each step: what is known of its output on each ball.

    The environment holds tensors of the right shapes for nodes that ask for these.

    Attributes:
        traced: the graph, of a model in float64, in eval mode, without folded scales.
        balls: the balls.
        states: those found so far, of nodes that are tensors.
        bundles: those of nodes that are tuples; None for what is no tensor.
    """

    def __init__(self, traced: Traced, balls: Balls, rows: int) -> None:
        """Start a pass whose tensors have so many rows.

        Raises:
            NotApplicable: the graph takes several samples at once, and may mix them on the way.
        """
        super().__init__(traced.graph_module, garbage_collect_values=False)
        if traced.batch > 1:
            raise NotApplicable("a graph of several samples")
        self.extra_traceback = False
        self.traced, self.balls, self._rows = traced, balls, rows
        self.states: dict[fx.Node, State] = {}
        self.bundles: dict[fx.Node, tuple[State | None, ...]] = {}

    @abstractmethod
    def first(self) -> State:
        """The state of the model's input."""

    @abstractmethod
    def follow(self, n: fx.Node, step: Step, sources: Sequence[fx.Node]) -> State:
        """The state of a step, or of one of those whose outputs a node gives as a tuple, from those of its inputs.

        Raises:
            NotApplicable: there is none.
        """

    def run_to_last(self) -> State:
        """The state of the model's output."""
        self.run(self.balls.x)
        return self.states[next(n for n, step in self.traced.steps.items() if step is self.traced.last)]

    def run_node(self, n: fx.Node) -> Any:
        step, parts = self.traced.steps.get(n), self.traced.bundles.get(n)
        if self.traced.takes_part(n):
            taken = self.bundles[n.args[0]][n.args[1]]  # type: ignore[index]
            if isinstance(taken, tuple):
                self.bundles[n] = taken
            elif taken is not None:
                self.states[n] = taken
        elif parts is not None:
            self.bundles[n] = tuple(None if part is None else self._state(n, part) for part in parts)
        elif step is not None:
            self.states[n] = self._state(n, step)
        else:
            return super().run_node(n)
        return self._placeholder(step) if parts is None else tuple(map(self._placeholder, parts))

    def arguments(self, n: fx.Node, given: Callable[[State], Any]) -> tuple[Any, Any]:
        """A node's arguments, with something of the states in place of traced tensors."""

        def argument(a: fx.Node) -> Any:
            return given(self.states[a]) if a in self.states else self.env[a]

        return fx.node.map_arg(n.args, argument), fx.node.map_arg(n.kwargs, argument)

    def weights(self, step: Step, values: Callable[[State], Interval]) -> list[tuple[State, Tensor]]:
        """The state of each input of a step whose factor is weighted, and its weight on each ball, [B].

        ``values`` gives bounds of the values of an input on each ball.
        """
        assert isinstance(step.factor, Weighted)
        nodes = {own: node for node, own in self.traced.steps.items()}
        inputs = [self.states[nodes[source]] for source in step.inputs]
        bounds = [values(state) for state in inputs]
        rows = [step.factor.weights([x.rows(slice(i, i + 1)) for x in bounds]) for i in range(len(self.balls.x))]
        found = torch.tensor(rows, dtype=torch.float64, device=self.balls.x.device)
        return list(zip(inputs, found.nan_to_num(nan=INF).unbind(1), strict=True))

    def _state(self, n: fx.Node, step: Step) -> State:
        if not step.inputs:
            return self.first()
        return self.follow(n, step, [a for a in n.all_input_nodes if a in self.states])

    def _placeholder(self, step: Step | None) -> Tensor | None:
        return None if step is None else self.balls.x.new_zeros(()).expand(self._rows, *step.shape)


def fits(step: Step, layer: Operator) -> bool:
    """Whether a layer's entries are the samples of the graph: elsewhere they may be parts of one."""
    shapes = (layer.input_shape, layer.output_shape)
    return (shapes[::-1] if isinstance(step.module, TRANSPOSED) else shapes) == (step.inputs[0].shape, step.shape)


def is_layer(step: Step) -> bool:
    """Whether a step is a layer with weights that its operator describes exactly."""
    return step.module is not None and find_rule(step.module) is weighted and step.exact
