"""How large the tensors of a network get on a domain, where constants depend on it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz._combinations import Combination, Weighted, weighted_sum
from fastlip.lipschitz._domain import Domain, row, stacked
from fastlip.lipschitz._graph import Traced
from fastlip.lipschitz._intervals import Interval, as_rows, upper_norm
from fastlip.lipschitz._log_arithmetic import exp10, log10, multiply
from fastlip.lipschitz._steps import Step, in_graph, in_sample, topological_order
from fastlip.norms import NormInterval, Operator
from fastlip.norms._models.inputs import Refused

#: Rounding error of a step's values in float64, relative to them and to what its constant makes of its input.
_ROUNDING = 1e-9
#: The same in float32.
_ROUNDING_FLOAT32 = 1e-3
#: Rounding of the replay's values, which may be those of the model's own dtype, relative to the largest.
_SLACK = 1e-2
#: Stands for finite numbers that are not known.
_SOME = 1e300


@dataclass(frozen=True, eq=False)
class Sizes:
    """How large the inputs of a step are, as far as its constant depends on it.

    Attributes:
        weights: log10 of what the constant of each input is multiplied by.
        largest: upper bound on the magnitude of an element of each input.
    """

    weights: tuple[float, ...]
    largest: tuple[float, ...]


def sizes_on(traced: Traced, logs: dict[Step, float] | None, domain: Domain, device: torch.device) -> dict[Step, Sizes]:
    """How large the inputs of all steps are whose constants depend on it.

    Interval arithmetic follows the graph, for the domain and for its centre alone; and no tensor is further from its
    value at the centre than its constant times the domain's reach.

    Args:
        traced: the graph.
        logs: log10 of the constants of steps with one; None to find out only whether all steps have a constant.
        domain: the set of inputs.
        device: where to compute.

    Raises:
        ValueError: a step has no constant on this domain; the message names it.
    """
    order = topological_order(traced.last)
    needing = {s for s in order if isinstance(s.factor, Weighted)}
    if not needing:
        return {}
    wanted: set[Step] = set()
    stack = [source for step in needing for source in step.inputs]
    while stack:
        step = stack.pop()
        if step not in wanted:
            wanted.add(step)
            stack.extend(step.inputs)
    return _Follow(traced, logs, domain, wanted, needing).run(device)


class _Follow:
    """One pass through the graph with intervals of two rows: the domain, and its centre alone."""

    def __init__(
        self, traced: Traced, logs: dict[Step, float] | None, domain: Domain, wanted: set[Step], needing: set[Step]
    ) -> None:
        self._traced, self._logs, self._domain = traced, logs, domain
        self._wanted, self._asked = wanted, wanted | needing
        self._reach = log10(domain.reach)
        self._totals: dict[Step, float] = {}
        self._intervals: dict[Step, Interval] = {}
        self._uses = Counter(source for step in self._asked for source in set(step.inputs))
        self._sizes: dict[Step, Sizes] = {}
        #: The first step on the way to each unbounded one of which nothing is known.
        self._unknown: dict[Step, Step] = {}

    def run(self, device: torch.device) -> dict[Step, Sizes]:
        nodes = list(self._traced.graph_module.graph.nodes)
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        done: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last_use.items():
            done.setdefault(node, []).append(source)
        env: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op != "output":
                env[node] = self._value(node, env, device)
            for source in done.get(node, ()):
                del env[source]
        return self._sizes

    def _value(self, node: fx.Node, env: dict[fx.Node, Any], device: torch.device) -> Any:
        """The interval of a node, the tuple of those of its parts, or the constant that it is."""
        step, bundle = self._traced.steps.get(node), self._traced.bundles.get(node)
        if step is not None and not step.inputs:
            return self._keep(step, self._domain.interval(device), 0.0)
        if self._traced.takes_part(node):
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        args: Any = fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, env.__getitem__)
        if bundle is not None:
            return tuple(None if part is None else self._step(part, args, kwargs) for part in bundle)
        return self._traced.values.constants.get(node) if step is None else self._step(step, args, kwargs)

    def _step(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval | None:
        """Bounds of a step's values; None if nobody asks for them."""
        if step not in self._asked:
            return None
        total, known = self._total(step), None
        if step in self._wanted:
            bounds = self._by_constant(step, args, kwargs) if step.interval is None else step.interval(*args, **kwargs)
            known = self._keep(step, self._by_norm(step, bounds, args, kwargs), total)
        for source in set(step.inputs):
            self._uses[source] -= 1
            if not self._uses[source]:
                del self._intervals[source]
        return known

    def _total(self, step: Step) -> float:
        """log10 of the constant up to a step.

        Raises:
            ValueError: it depends on how large something is that nothing bounds.
        """
        totals = [self._totals[source] for source in step.inputs]
        if isinstance(step.factor, Weighted):
            given = [row(self._intervals[source], 0) for source in step.inputs]
            weights = tuple(log10(weight) for weight in step.factor.weights(given))
            largest = tuple(i.magnitude().max().item() if i.lower.numel() else 0.0 for i in given)
            self._sizes[step] = Sizes(weights, largest)
            total = weighted_sum(totals, weights)
            if total == math.inf and max(totals) < math.inf:
                raise ValueError(self._why_not(step))
            return total
        if isinstance(step.factor, Combination):
            return step.factor.constant(totals, ())
        return multiply(self._log(step), totals[0])

    def _log(self, step: Step) -> float:
        return 0.0 if self._logs is None else self._logs[step]

    def _why_not(self, step: Step) -> str:
        where = f"{step.name} ({step.kind})"
        if not self._domain.bounded:
            return (
                f"{where} has no global Lipschitz constant, as its slope grows with its inputs, which nothing bounds; "
                "it may have one on a bounded set of inputs: give bounds=(lower, upper), or around= and radius="
            )
        unknown = next((self._unknown[source] for source in step.inputs if source in self._unknown), None)
        if unknown is None:
            return f"{where} has no bound on this domain: its slope is not bounded where its inputs are known to lie"
        return (
            f"{where} has no bound on this domain, because nothing is known of how large {unknown.name} "
            f"({unknown.kind}) gets there; register a rule for it that returns fastlip.lipschitz.Ranged"
        )

    def _by_constant(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        """Bounds from the value at the middle and the constant: no value is further away than that times the radius."""
        source = self._intervals[step.inputs[0]]
        unbounded = Interval.unbounded(step.shape, 2, source.lower.device)
        if len(step.inputs) != 1 or step.folded or step.scaled:
            return unbounded
        centre, radius = source.centre_and_radius()
        local = step in self._sizes
        log = self._sizes[step].weights[0] if local else self._log(step)
        constant = _SOME if self._logs is None else exp10(log)

        def middle(value: Any, at: int, dtype: torch.dtype) -> Any:
            if isinstance(value, Interval):
                return in_graph(centre[at : at + 1], step.inputs[0], self._traced.batch).to(dtype)
            return tuple(middle(v, at, dtype) for v in value) if isinstance(value, (tuple, list)) else value

        def computed(dtype: torch.dtype) -> list[Tensor]:
            given = [(middle(args, at, dtype), {k: middle(v, at, dtype) for k, v in kwargs.items()}) for at in range(2)]
            return [step.apply(*positional, **named).double() for positional, named in given]

        try:
            rows, rounding = computed(torch.float64), _ROUNDING
        except (RuntimeError, TypeError, ValueError):  # it may support one dtype only
            try:
                rows, rounding = computed(torch.float32), _ROUNDING_FLOAT32
            except (RuntimeError, TypeError, ValueError):
                return unbounded
        value = torch.cat([in_sample(row, step) for row in rows])
        if value.shape[1:] != step.shape or not bool(value.isfinite().all()):
            return unbounded
        flat = torch.linalg.vector_norm
        margin = rounding * (as_rows(value).abs().amax(1) + constant * flat(as_rows(centre), dim=1))
        distance = constant * flat(as_rows(radius), dim=1) * (1.0 + _ROUNDING) + margin
        if local:  # the middle of the bounds need not be a value that the constant speaks of; the centre's is
            distance[0] = math.inf
        return Interval(value, value).widened(distance.nan_to_num(nan=math.inf))

    def _by_norm(self, step: Step, known: Interval, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        """What is known of a step, whose norm is at most its constant times the input's, and that of its value at 0."""
        layer = isinstance(step.factor, (Operator, NormInterval)) and step.exact
        if not layer or step.folded or step.scaled or self._logs is None:
            return known
        source = self._intervals[step.inputs[0]]
        if not bool(source.norm.isfinite().any()):
            return known

        zeros = in_graph(torch.zeros_like(source.lower[:1]), step.inputs[0], self._traced.batch)

        def nothing(value: Any) -> Any:
            return zeros if isinstance(value, Interval) else value

        try:
            offset = step.apply(*map(nothing, args), **{name: nothing(v) for name, v in kwargs.items()}).double()
        except (RuntimeError, TypeError, ValueError):  # it may support one dtype only
            return known
        norm = exp10(self._logs[step]) * source.norm + upper_norm(in_sample(offset, step).abs())
        return Interval(known.lower, known.upper, torch.minimum(known.norm, norm * (1.0 + _ROUNDING)))

    def _require_seen(self, step: Step, known: Interval) -> None:
        """Raise Refused if the replay gave values outside of the bounds, by more than rounding."""
        if step.seen is None or not known.lower.numel():
            return
        lower, upper = known.lower[0].min().item(), known.upper[0].max().item()
        least, largest = step.seen.tolist()
        slack = _SLACK * max(abs(least), abs(largest))
        if least < lower - slack or largest > upper + slack:
            raise Refused(
                f"{step.name} ({step.kind}) has values from {least:.4g} to {largest:.4g} on this domain, outside of "
                f"the bounds from {lower:.4g} to {upper:.4g}. If it has a rule of its own, that is wrong; otherwise "
                "please report this model to fastlip's developers"
            )

    def _keep(self, step: Step, known: Interval, total: float) -> Interval:
        """Store what is known of a step, sharpened by its distance from the value at the centre."""
        if self._reach < math.inf and not step.ahead:
            moved = _SOME if self._logs is None else exp10(multiply(total, self._reach))
            # Where nothing can be that far from the centre's value this says nothing.
            if moved < 1.01 * known.norm.sum().item():
                point = row(known, 1)
                known = stacked([row(known, 0).intersection(point.widened(moved)), point])
        self._require_seen(step, known)
        self._totals[step], self._intervals[step] = total, known
        if not bool(row(known, 0).norm.isfinite()):
            earlier = [self._unknown[source] for source in step.inputs if source in self._unknown]
            self._unknown[step] = earlier[0] if earlier else step
        return known
