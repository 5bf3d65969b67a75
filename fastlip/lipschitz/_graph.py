"""The steps of a traced model."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._calls import Call, Made, as_function, function_call, has_all_values, module_call
from fastlip.lipschitz._export import export_graph
from fastlip.lipschitz._factors import function_factor
from fastlip.lipschitz._module_steps import layer_operator, module_step, takes_scale
from fastlip.lipschitz._registry import (
    Diagonal,
    FunctionCall,
    MissingRule,
    find_function_rule,
    function_builders,
    missing_function_rule,
    missing_rule,
    module_builders,
    no_rule_possible,
)
from fastlip.lipschitz._rules.functional import step_by_module
from fastlip.lipschitz._steps import Step, topological_order
from fastlip.lipschitz._trace import Untraceable, Values, location, run_model, trace_graph
from fastlip.norms._models.inputs import Refused, random_inputs, runs_on
from fastlip.norms._models.tracing import Described


@dataclass(frozen=True)
class Traced:
    """A traced model: its graph, the steps of the nodes that depend on the input, and the last of them.

    ``bundles`` are the steps of nodes that are tuples of tensors, in which other things than tensors are None; a node
    that takes an element has the element's step. ``values`` are those of the run from which the steps were made, on as
    many samples as the graph takes at once.
    """

    graph_module: fx.GraphModule
    steps: dict[fx.Node, Step]
    bundles: dict[fx.Node, tuple[Step | None, ...]]
    last: Step
    values: Values

    @property
    def batch(self) -> int:
        """The number of samples that the graph takes at once."""
        return self.values.batch

    def takes_part(self, node: fx.Node) -> bool:
        """Whether a node takes an element of a tuple, or a part of one."""
        return node.target is operator.getitem and node.args[0] in self.bundles

    def modules(self) -> list[nn.Module]:
        """The modules that the graph calls, and their submodules."""
        called = {str(node.target) for node in self.graph_module.graph.find_nodes(op="call_module")}
        return [m for target in called for m in self.graph_module.get_submodule(target).modules()]


def trace(model: nn.Module, input_shape: Sequence[int]) -> Traced:
    """The graph of a model in eval mode, with a step for each node that depends on the input.

    It is traced by torch.fx, or by torch.export where torch.fx cannot trace it or gives calls without a rule.

    Raises:
        ValueError: the model cannot be traced or run, or a step has no rule; the message names it.
    """
    x = random_inputs(model, input_shape, 2)
    with torch.no_grad():
        try:
            traced = _traced(model, x[:1])
        except (Refused, torch.OutOfMemoryError):
            raise
        except ValueError as error:
            try:
                run_model(model, x[:1])
            except Exception:  # a model may raise anything on a size that it was not made for
                with runs_on(model, input_shape):
                    run_model(model, x)
                return _traced(model, x)
            raise error
        # Some models drop the batch axis of a single sample, and may then mistake another axis for it.
        return traced if traced.last.alone else _traced(model, x)


def _traced(model: nn.Module, x: Tensor) -> Traced:
    """:func:`trace` for batches of the size of x, [B, ...]."""
    try:
        return _build(*trace_graph(model, x))
    except (Untraceable, MissingRule, Refused) as error:
        first = error
    try:
        return _build(*export_graph(model, x))
    except MissingRule as error:
        raise (error if isinstance(first, Untraceable) else first) from None
    except Untraceable as error:
        if not isinstance(first, Untraceable):
            raise first from None
        raise ValueError(
            f"{first}; {error}; register a rule for the module, or write its forward without what depends on data"
        ) from first


def _build(graph_module: fx.GraphModule, values: Values) -> Traced:
    made = Made({}, {})
    for node in graph_module.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            if result in made.without:
                raise _without_step(node, result, made.without[result], values)
            if not isinstance(result, fx.Node) or result not in made.steps:
                raise ValueError("the model must return one tensor that depends on its input")
            last = made.steps[result]
            leading = set(topological_order(last))
            for step in leading:  # a result that nothing reads is no reason to fold factors into what gives it
                step.users = [user for user in step.users if user in leading]
            return Traced(graph_module, made.steps, made.bundles, last, values)
        if node in values.others:
            raise missing_rule(f"{values.others[node]!r}, which depends on the numbers in the input", location(node))
        if node not in values.shapes and node not in values.bundles:
            continue
        if values.batch > 1:
            _require_batch_first(node, values)
        if node.op == "placeholder":
            made.steps[node] = Step(node.name, "input", [], 1.0, values.shapes[node][1:])
        elif node.target is operator.getitem and node.args[0] in made.bundles:
            _take_parts(node, made)
        else:
            _add(node, _step(node, graph_module, made, values), made, values)
    raise AssertionError("a traced graph ends in an output")


def _require_batch_first(node: fx.Node, values: Values) -> None:
    """Raise ValueError if a tensor that a node gives has no row for each sample."""
    parts = [part.shape for part in values.bundles.get(node, ()) if isinstance(part, Described)]
    if not all(values.alone(shape) for shape in parts or [values.shapes[node]]):
        raise ValueError(f"{node.format_node()} mixes the batch axis into others, which no Lipschitz rule covers")


def _take_parts(node: fx.Node, made: Made) -> None:
    """An element of a tuple, or a slice of it, is made of the same steps."""
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    taken = made.bundles[whole][index]  # type: ignore[index]
    if isinstance(taken, tuple):
        made.bundles[node] = taken
    elif taken is not None:
        made.steps[node] = taken
    else:
        made.without[node] = whole


def _require_no_rounding(node: fx.Node, step: Step, values: Values) -> None:
    """Raise ValueError where a step of torch's own rounds to a dtype that lacks some values, as under autocast."""
    after = values.dtypes.get(node, torch.float64)
    own = step.module is None or type(step.module).__module__.startswith("torch.")
    before = [values.dtypes[source] for source in node.all_input_nodes if source in values.dtypes]
    if own and after.is_floating_point and not all(has_all_values(after, dtype) for dtype in before):
        raise ValueError(f"{step.name}: {step.kind} rounds to {after}, and has no Lipschitz constant; avoid autocast")


def _add(node: fx.Node, result: Step | Sequence[Step | None], made: Made, values: Values) -> None:
    steps: Sequence[Step | None]
    if isinstance(result, Step):
        made.steps[node] = result
        _require_no_rounding(node, result, values)
        steps, shapes = [result], [values.shapes[node]]
    else:
        made.bundles[node] = steps = tuple(result)
        shapes = [part.shape if isinstance(part, Described) else () for part in values.bundles[node]]
    for step, shape in zip(steps, shapes, strict=True):
        if step is None:
            continue
        step.alone = values.alone(shape)
        for source in dict.fromkeys(step.inputs):
            source.users.append(step)


def _step(node: fx.Node, graph_module: fx.GraphModule, made: Made, values: Values) -> Step | Sequence[Step | None]:
    """The step of a node, or those of a tuple's parts: by the first builder of its target that takes it, or by a rule.

    Raises:
        ValueError: nothing makes one; the message names the module or function.
    """
    for part in node.all_input_nodes:
        if part in made.without:
            raise _without_step(node, part, made.without[part], values)
    if node.op == "call_module":
        call = module_call(node, graph_module, made, values)
        builders = [*module_builders(call.target), module_step]
    else:
        call = function_call(node, made, values)
        if not call.sources:
            # Its inputs are lists or numbers, whose dependence on the input is not tracked.
            source = getattr(node.all_input_nodes[0], "name", "")
            raise missing_rule(f"{call.name} of something other than a traced tensor ({source})", call.where)
        ours, fixed = function_builders(call.target)
        builders = [*([*ours, _step_by_rule] if fixed else [_step_by_rule, *ours]), _step_by_module]
    for builder in builders:
        made_of = builder(call)
        if made_of is None:
            continue
        if isinstance(made_of, Step) == (node in values.shapes):
            return made_of
        raise missing_rule(f"{call.name} with these outputs", call.where)
    raise missing_function_rule(call.target, call.where)


def _without_step(node: fx.Node, part: fx.Node, whole: fx.Node, values: Values) -> MissingRule:
    """The error for a node that reads a part of a tuple of which no rule says anything."""
    if not (values.dtypes[part].is_floating_point or values.dtypes[part].is_complex):
        return MissingRule(
            f"{node.name} reads the indices that {location(whole)} gives, which jump, and have no Lipschitz constant; "
            "where the whole has one, make it a module with a rule (@fastlip.lipschitz.rule)"
        )
    return missing_rule(f"{node.name}, which reads more than the first result of {whole.name},", location(node))


def _step_by_module(call: Call) -> Step | None:
    """The step of a function by the rule of a module that does the same."""
    if not call.on_one:
        raise no_rule_possible(call.target, call.where) or missing_rule(
            f"{call.name} of several traced tensors, or with the input in another place", call.where
        )
    return step_by_module(call)


def _step_by_rule(call: Call) -> Step | None:
    """The step of a function by the rule that a user registered for it, or None without one."""
    rule = find_function_rule(call.target)
    if rule is None or not call.on_one:
        return None
    asked = FunctionCall(tuple(call.args[1:]), dict(call.kwargs))
    shape = call.shape
    stated = function_factor(rule, asked, call.name, call.where, call.sources[0].entry_shape, shape)
    apply = as_function(call.target)
    return Step(call.where, call.name, call.sources, stated.factor, shape, apply=apply, interval=stated.interval)


def fold_scales(last: Step) -> None:
    """Multiply factors per channel into the neighbouring layer with weights, before its norm is computed."""
    scales: dict[Step, dict[str, Tensor]] = {}
    for step in topological_order(last):
        if not isinstance(step.factor, Diagonal) or not step.exact:
            continue
        before, after = step.inputs[0], step.users[0] if len(step.users) == 1 else None
        if before.users == [step] and takes_scale(before):
            scales.setdefault(before, {})["output_scale"] = step.factor.scale
            before.ahead = True
        elif after is not None and takes_scale(after):
            scales.setdefault(after, {})["input_scale"] = step.factor.scale
            step.ahead = True
        else:
            continue
        step.factor, step.folded = 1.0, True
    for step, factors in scales.items():
        step.factor = layer_operator(step, **factors)
        step.scaled = True
