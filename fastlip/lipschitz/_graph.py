"""A traced model: what each node of its graph does, on which shapes."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz import _functions as functions
from fastlip.lipschitz._linear import weighted
from fastlip.lipschitz._registry import Diagonal, Factor, find_rule, missing_rule
from fastlip.norms import NormInterval, Operator, bare_model, eval_mode, example_input, module_operator, runs_on

# Two samples, so that an operation that mixes the batch axis into others shows.
_BATCH = 2


@dataclass(eq=False)
class Step:
    """One node that depends on the input.

    Attributes:
        name: qualified module name, or the node's name.
        kind: class of the module, or the function's name.
        inputs: steps it takes its tensors from.
        factor: what multiplies the Lipschitz constant; for several inputs, "sum", "difference" or "concatenation".
        shape: shape of one output sample.
        module: the module called, or the one that does the same as the function.
        users: steps that take this one's output.
        folded: whether ``factor`` was multiplied into a neighbour and is 1 now.
        scaled: whether a neighbour's factors were multiplied into this one.
    """

    name: str
    kind: str
    inputs: list["Step"]
    factor: Factor | str
    shape: tuple[int, ...]
    module: nn.Module | None = None
    users: list["Step"] = field(default_factory=list)
    folded: bool = False
    scaled: bool = False


class _Tracer(fx.Tracer):
    """Stops at modules with a rule as well as at torch's own, and remembers which module could not be traced."""

    failed = ""

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


class _Values(fx.Interpreter):
    """Runs the graph once and keeps shapes, and the values of what is not a tensor of the batch."""

    def __init__(self, graph_module: fx.GraphModule, varying: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.constants: dict[fx.Node, Any] = {}
        self._varying = varying
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        for source in n.all_input_nodes:
            if source in self._versions and self.env[source]._version != self._versions[source]:
                raise ValueError(
                    f"{_location(source)} is used by {_location(n)} after an in-place operation overwrote it, "
                    "so that the traced graph is not what runs; use inplace=False there"
                )
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._versions[n] = value._version
        if isinstance(value, Tensor) and n in self._varying:
            self.shapes[n] = tuple(value.shape)
        elif n.op != "output":
            self.constants[n] = value
        return value


def trace(model: nn.Module, input_shape: Sequence[int]) -> Step:
    """The last step of a model's graph, in eval mode.

    Raises:
        TypeError: the model is no module.
        ValueError: the model cannot be traced or run, or a step has no rule; the message names it.
    """
    model = bare_model(model)
    name = type(model).__name__
    tracer = _Tracer()
    # A leaf is not traced into, so it needs something around it.
    root = nn.Sequential(OrderedDict({name: model})) if tracer.is_leaf_module(model, "") else model
    with eval_mode(model), torch.no_grad():
        try:
            graph = tracer.trace(root, _defaults(root) or None)
        except Exception as error:
            failed = tracer.failed
            what = f"{type(model.get_submodule(failed)).__name__} (at {failed})" if failed else name
            raise ValueError(
                f"{what} cannot be traced by torch.fx ({error}); register a rule for the module, "
                "or write its forward without what depends on data"
            ) from error
        graph_module = fx.GraphModule(root, graph)
        for node in graph.find_nodes(op="call_module"):
            module = graph_module.get_submodule(str(node.target))
            if find_rule(module) is None:
                raise missing_rule(type(module).__name__, str(node.target))
        varying = _varying_nodes(graph)
        values = _Values(graph_module, varying)
        x = example_input(model, input_shape)
        with runs_on(model, input_shape):
            values.run(x.expand(_BATCH, *x.shape[1:]).contiguous())
        return _build(graph_module, values)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments of a module's forward that a call with one tensor leaves at their defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _varying_nodes(graph: fx.Graph) -> set[fx.Node]:
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and not node.args) or any(source in varying for source in node.all_input_nodes):
            varying.add(node)
    return varying


def _build(graph_module: fx.GraphModule, values: _Values) -> Step:
    steps: dict[fx.Node, Step] = {}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or result not in steps:
                raise ValueError("the model must return one tensor that depends on its input")
            return steps[result]
        if node not in values.shapes:
            continue
        shape = values.shapes[node]
        if shape[:1] != (_BATCH,):
            raise ValueError(f"{node.format_node()} mixes the batch axis into others, which no Lipschitz rule covers")
        if node.op == "placeholder":
            if steps:
                raise ValueError("the model must take one tensor")
            steps[node] = Step(node.name, "input", [], 1.0, shape[1:])
            continue
        step = _step(node, steps, graph_module, values)
        for source in dict.fromkeys(step.inputs):
            source.users.append(step)
        steps[node] = step
    raise AssertionError("a traced graph ends in an output")


def _step(node: fx.Node, steps: dict[fx.Node, Step], graph_module: fx.GraphModule, values: _Values) -> Step:
    shape = values.shapes[node][1:]
    sources = [steps[source] for source in node.all_input_nodes if source in steps]
    if node.op == "call_module":
        name = str(node.target)
        module = graph_module.get_submodule(name)
        if len(sources) != 1:
            raise missing_rule(f"{type(module).__name__} with {len(sources)} inputs", name)
        factor = module_factor(module, name, sources[0].shape)
        step = Step(name, type(module).__name__, sources, factor, shape, module)
        if find_rule(module) is weighted and len(node.args) + len(node.kwargs) > 1:
            step.factor = _operator(step)  # a transposed convolution that was told its output's size
        return step
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    args: Any = fx.node.map_arg(node.args, lambda n: values.constants.get(n, n))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values.constants.get(n, n))
    where = _location(node)
    if not sources:
        # Its inputs are lists, or numbers taken from tensors: what they depend on is not followed.
        source = getattr(node.all_input_nodes[0], "name", "")
        raise missing_rule(f"{name} of something other than a traced tensor ({source})", where)
    if target in functions.ADD or target in functions.SUBTRACT:
        operands = [a for a in args if isinstance(a, fx.Node)]
        if kwargs or len(args) != 2 or any(values.shapes[a][1:] != shape for a in operands):
            raise missing_rule(f"{name} with broadcasting or alpha", where)
        # x + x counts twice; adding a constant moves nothing.
        inputs = [steps[a] for a in operands]
        several = "sum" if target in functions.ADD else "difference"
        return Step(where, name, inputs, several if len(inputs) > 1 else 1.0, shape)
    if target in functions.CONCATENATE:
        inputs = [steps[a] for a in (args[0] if args else kwargs["tensors"]) if isinstance(a, fx.Node)]
        return Step(where, name, inputs, "concatenation", shape)
    if len(sources) == 1 and target in functions.MULTIPLY and not kwargs and len(args) == 2:
        constant = args[1] if isinstance(args[0], fx.Node) else args[0]
        return Step(where, name, sources, _scaling(constant, 1, sources[0], shape, where), shape)
    if len(sources) != 1 or not args or not isinstance(args[0], fx.Node):
        raise missing_rule(f"{name} of several traced tensors, or with the input in another place", where)
    if target in functions.DIVIDE and not kwargs:
        return Step(where, name, sources, _scaling(args[1], -1, sources[0], shape, where), shape)
    if target in functions.MEAN:
        # The mean of m values moves by at most 1/sqrt(m) of the move's norm.
        ratio = math.prod(sources[0].shape) / max(math.prod(shape), 1)
        return Step(where, name, sources, ratio**-0.5 * (1.0 + 1e-15), shape)
    try:
        module_like = functions.as_module(target, tuple(args[1:]), dict(kwargs))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if module_like is None:
        raise missing_rule(f"the function {name}", where)
    return Step(where, name, sources, module_factor(module_like, where, sources[0].shape), shape, module_like)


def _location(node: fx.Node) -> str:
    """The module a function is called in, and the node's name."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack)) if stack else ""
    return f"{path}.{node.name}" if path else node.name


def module_factor(module: nn.Module, name: str, input_shape: tuple[int, ...]) -> Factor:
    """What a module's rule says; errors name the module."""
    found = find_rule(module)
    if found is None:
        raise missing_rule(type(module).__name__, name)
    try:
        factor = found(module, input_shape)
    except ValueError as error:
        raise ValueError(f"module {name}: {error}") from None
    if not isinstance(factor, (int, float, NormInterval, Operator, Diagonal)):
        raise ValueError(
            f"the rule of {type(module).__name__} (at {name}) returned {type(factor).__name__}, not a float, "
            "NormInterval, Operator or Diagonal"
        )
    if isinstance(factor, (int, float)) and not 0.0 <= factor < math.inf:
        raise ValueError(f"the rule of {type(module).__name__} (at {name}) returned {factor}, not a finite bound >= 0")
    return factor


def _scaling(constant: Any, power: int, source: Step, shape: tuple[int, ...], where: str) -> Factor:
    """Multiplication (power 1) or division (-1) by a number or a tensor that does not depend on the input."""
    if isinstance(constant, fx.Node):
        raise missing_rule("a product of a traced tensor with itself", where)
    value = torch.as_tensor(constant, dtype=torch.float64) ** power
    if shape != source.shape or not torch.isfinite(value).all():
        raise missing_rule("a factor that broadcasts the input or is not finite", where)
    channels = shape[0]
    # [C, 1, ..., 1] or [1, C, 1, ..., 1], as means and standard deviations come.
    if value.numel() == channels > 1 and value.dim() >= len(shape) and value.shape[-len(shape)] == channels:
        return Diagonal(value.flatten().cpu())
    return value.abs().max().item() * (1.0 + 1e-15)


def fold_scales(last: Step) -> None:
    """Multiply factors per channel into the neighbouring layer with weights, before its norm is taken."""
    scales: dict[Step, dict[str, Tensor]] = {}
    for step in walk(last):
        if not isinstance(step.factor, Diagonal):
            continue
        before, after = step.inputs[0], step.users[0] if len(step.users) == 1 else None
        if before.users == [step] and _takes_scale(before):
            scales.setdefault(before, {})["output_scale"] = step.factor.scale
        elif after is not None and _takes_scale(after):
            scales.setdefault(after, {})["input_scale"] = step.factor.scale
        else:
            continue
        step.factor, step.folded = 1.0, True
    for step, factors in scales.items():
        step.factor = _operator(step, **factors)
        step.scaled = True


def _operator(step: Step, **scales: Any) -> Operator:
    """The linear map of a layer with torch's own rule, on the shapes of its step."""
    assert step.module is not None
    return module_operator(step.module, step.inputs[0].shape, output_size=step.shape[1:], **scales)


def _takes_scale(step: Step) -> bool:
    """Whether a layer with torch's own rule, applied to channels."""
    return (
        isinstance(step.factor, Operator)
        and step.module is not None
        and find_rule(step.module) is weighted
        and (not isinstance(step.module, nn.Linear) or len(step.shape) == 1)
    )


def walk(last: Step) -> list[Step]:
    """All steps that lead to the last one, inputs first."""
    order: list[Step] = []
    seen: set[Step] = set()
    stack: list[tuple[Step, bool]] = [(last, False)]
    while stack:
        step, ready = stack.pop()
        if ready:
            order.append(step)
        elif step not in seen:
            seen.add(step)
            stack.append((step, True))
            stack.extend((source, False) for source in step.inputs)
    return order


def origin_of(step: Step) -> Step:
    """The last step that every path from the model's input to this one goes through."""
    order = {s: at for at, s in enumerate(walk(step))}
    pending = set(step.inputs)
    while len(pending) > 1:
        latest = max(pending, key=lambda s: order[s])
        pending.remove(latest)
        pending.update(latest.inputs)
    return pending.pop()
