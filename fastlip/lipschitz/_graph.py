"""A traced model as steps: what each of them does, on which shapes, and the factor that its rule gives it."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz import _functions as functions
from fastlip.lipschitz._activation_rules import require_continuous
from fastlip.lipschitz._layer_rules import batchnorm, weighted
from fastlip.lipschitz._registry import (
    Diagonal,
    Factor,
    FunctionCall,
    Rule,
    find_function_rule,
    find_rule,
    missing_function_rule,
    missing_rule,
)
from fastlip.lipschitz._trace import Values, location, module_name, trace_graph, varying_nodes
from fastlip.norms import NormInterval, Operator, module_operator
from fastlip.norms._models.closeness import agree, rounding_of
from fastlip.norms._models.inputs import random_inputs, runs_on
from fastlip.norms._models.layer_output import apply_operator
from fastlip.norms._operators.modules import TRANSPOSED

#: Two samples reveal operations that mix the batch axis into others.
BATCH = 2


@dataclass(eq=False)
class Step:
    """One node of the graph that depends on the input.

    Attributes:
        name: qualified name of the module, or the node's name.
        kind: class of the module, or name of the function.
        inputs: the steps whose outputs it reads.
        factor: factor of the Lipschitz constant; with several inputs "sum", "difference" or "concatenation".
        shape: shape of one output sample.
        module: the module called, or one that does the same as the function; None if values are only moved.
        apply: what the rule bounds, as a function of the node's arguments: out of place, without hooks, and with the
            operator, factors or constants from which the bound is computed.
        users: the steps that read its output.
        folded: whether ``factor`` was multiplied into a neighbouring step and is 1 now.
        scaled: whether a neighbour's factors were multiplied into this step.
        ahead: whether the constant up to this step misses the factors of a neighbour, or contains them too early.
        exact: whether a linear ``factor`` is the map itself, and not only a map of at least its norm.
        moved: lower bound on the distance of the outputs of two samples, 0-d; None before the replay.
    """

    name: str
    kind: str
    inputs: list["Step"]
    factor: Factor | str
    shape: tuple[int, ...]
    module: nn.Module | None = None
    apply: Callable[..., Tensor] = operator.pos
    users: list["Step"] = field(default_factory=list)
    folded: bool = False
    scaled: bool = False
    ahead: bool = False
    exact: bool = True
    moved: Tensor | None = None


@dataclass(frozen=True)
class Traced:
    """A traced model: its graph, the steps of the nodes that depend on the input, and the last of them.

    ``constants`` are the values that all other nodes had in the run from which the steps were made.
    """

    graph_module: fx.GraphModule
    steps: dict[fx.Node, Step]
    last: Step
    constants: dict[fx.Node, Any]
    varying: set[fx.Node]

    def modules(self) -> list[nn.Module]:
        """The modules that the graph calls, and their submodules."""
        called = {str(node.target) for node in self.graph_module.graph.find_nodes(op="call_module")}
        return [m for target in called for m in self.graph_module.get_submodule(target).modules()]


def trace(model: nn.Module, input_shape: Sequence[int]) -> Traced:
    """The graph of a model in eval mode, with a step for each node that depends on the input.

    Raises:
        ValueError: the model cannot be traced or run, or a step has no rule; the message names it.
    """
    with torch.no_grad():
        graph_module = trace_graph(model)
        varying = varying_nodes(graph_module.graph)
        values = Values(graph_module, varying)
        x = random_inputs(model, input_shape, BATCH)
        with runs_on(model, input_shape):
            values.run(x)
        return _build(graph_module, values, varying)


def _build(graph_module: fx.GraphModule, values: Values, varying: set[fx.Node]) -> Traced:
    steps: dict[fx.Node, Step] = {}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or result not in steps:
                raise ValueError("the model must return one tensor that depends on its input")
            return Traced(graph_module, steps, steps[result], values.constants, varying)
        if node not in values.shapes:
            continue
        shape = values.shapes[node]
        if shape[:1] != (BATCH,):
            raise ValueError(f"{node.format_node()} mixes the batch axis into others, which no Lipschitz rule covers")
        if node.op == "placeholder":
            steps[node] = Step(node.name, "input", [], 1.0, shape[1:])
            continue
        step = _step(node, steps, graph_module, values)
        for source in dict.fromkeys(step.inputs):
            source.users.append(step)
        steps[node] = step
    raise AssertionError("a traced graph ends in an output")


def _step(node: fx.Node, steps: dict[fx.Node, Step], graph_module: fx.GraphModule, values: Values) -> Step:
    shape = values.shapes[node][1:]
    sources = [steps[source] for source in node.all_input_nodes if source in steps]
    if node.op == "call_module":
        return _module_step(node, sources, graph_module, values)
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    args: Any = fx.node.map_arg(node.args, lambda n: values.constants.get(n, n))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values.constants.get(n, n))
    where = location(node)
    if not sources:
        # Its inputs are lists or numbers, whose dependence on the input is not tracked.
        source = getattr(node.all_input_nodes[0], "name", "")
        raise missing_rule(f"{name} of something other than a traced tensor ({source})", where)
    if target in functions.ADD or target in functions.SUBTRACT:
        operands = [a for a in args if isinstance(a, fx.Node)]
        if kwargs or len(args) != 2 or any(values.shapes[a][1:] != shape for a in operands):
            raise missing_rule(f"{name} with broadcasting or alpha", where)
        # x + x counts x twice; adding a constant changes no distance.
        inputs = [steps[a] for a in operands]
        several, by = ("sum", operator.add) if target in functions.ADD else ("difference", operator.sub)
        return Step(where, name, inputs, several if len(inputs) > 1 else 1.0, shape, apply=_with_constants(by, args))
    if target in functions.CONCATENATE:
        inputs = [steps[a] for a in (args[0] if args else kwargs["tensors"]) if isinstance(a, fx.Node)]
        return Step(where, name, inputs, "concatenation", shape, apply=torch.cat)
    if len(sources) == 1 and target in functions.MULTIPLY and not kwargs and len(args) == 2:
        constant = args[1] if isinstance(args[0], fx.Node) else args[0]
        factor = _scaling(constant, 1, sources[0], shape, where)
        return Step(where, name, sources, factor, shape, apply=_with_constants(operator.mul, args))
    if len(sources) != 1 or not args or not isinstance(args[0], fx.Node):
        raise missing_rule(f"{name} of several traced tensors, or with the input in another place", where)
    if target in functions.DIVIDE and not kwargs:
        factor = _scaling(args[1], -1, sources[0], shape, where)
        return Step(where, name, sources, factor, shape, apply=_with_constants(operator.truediv, args))
    call = functions.as_function(target)
    if target in functions.MEAN:
        # The mean of m values changes by at most 1/sqrt(m) times the norm of their change.
        ratio = math.prod(sources[0].shape) / max(math.prod(shape), 1)
        return Step(where, name, sources, ratio**-0.5 * (1.0 + 1e-15), shape, apply=call)
    if target in functions.MOVE:
        if values.dtypes[node] != values.dtypes[args[0]]:
            raise missing_rule(f"{name} to another dtype", where)
        same = shape == sources[0].shape and target in functions.MOVE_IN_ORDER
        return Step(where, name, sources, 1.0, shape, nn.Identity() if same else None, apply=call)
    if (own := find_function_rule(target)) is not None:
        factor = _function_factor(own, FunctionCall(tuple(args[1:]), dict(kwargs)), name, where, sources[0].shape)
        return Step(where, name, sources, factor, shape, apply=call)
    try:
        module_like = functions.as_module(target, tuple(args[1:]), dict(kwargs))
    except (AssertionError, RuntimeError, TypeError):
        raise missing_rule(f"{name} with these arguments", where) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if module_like is None:
        raise missing_function_rule(target, where)
    factor = module_factor(module_like, where, sources[0].shape, values.dtypes[args[0]])
    forward = module_like.forward
    return Step(where, name, sources, factor, shape, module_like, apply=lambda x, *_, **__: forward(x))


def _module_step(node: fx.Node, sources: list[Step], graph_module: fx.GraphModule, values: Values) -> Step:
    module, name = graph_module.get_submodule(str(node.target)), module_name(node, graph_module)
    shape = values.shapes[node][1:]
    if len(sources) != 1:
        raise missing_rule(f"{type(module).__name__} with {len(sources)} inputs", name)
    source = next(n for n in node.all_input_nodes if n in values.shapes)
    factor = module_factor(module, name, sources[0].shape, values.dtypes[source])
    step = Step(name, type(module).__name__, sources, factor, shape, module)
    if find_rule(module) is weighted:
        if len(node.args) + len(node.kwargs) > 1:
            step.factor = _operator(step)  # a transposed convolution with an explicit output size
        step.apply = _weighted_map(module, step.factor)
        return step
    if isinstance(factor, Diagonal) and find_rule(module) is batchnorm:
        step.apply = _batchnorm_map(module, factor)
        return step
    step.apply = _forward(module)
    if isinstance(factor, (Operator, Diagonal)):
        linear = _linear_map(step.apply, factor)
        x = torch.rand(2, *sources[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        x = x.to(values.devices[source], values.dtypes[source])
        if _is_map(linear, step.apply, x):
            step.apply = linear
        else:  # its norm is a bound, but the map itself cannot be folded or added to a skip connection
            step.exact = False
    return step


def _is_map(linear: Callable[..., Tensor], forward: Callable[..., Tensor], x: Tensor) -> bool:
    """Whether the map that a rule returned is what the module computes; False if they cannot be compared."""
    try:
        return agree(linear(x), forward(x), 10.0 * rounding_of(x))
    except (RuntimeError, TypeError, ValueError):  # other shapes, or a forward that needs more arguments
        return False


def _forward(module: nn.Module) -> Callable[..., Tensor]:
    """A module's forward without its hooks, on copies of the arguments."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = fx.node.map_aggregate((args, kwargs), _copied)
        return type(module).forward(module, *args, **kwargs)

    return forward


def _weighted_map(module: nn.Module, factor: Factor | str) -> Callable[..., Tensor]:
    """The map of a layer with torch's own rule, computed by the operator that is bounded."""
    assert isinstance(factor, Operator)
    transposed = isinstance(module, TRANSPOSED)

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        return apply_operator(factor, x, module.bias, transposed=transposed)  # type: ignore[arg-type]

    return apply


def _batchnorm_map(module: nn.Module, factor: Diagonal) -> Callable[..., Tensor]:
    """A BatchNorm in eval mode, computed by the factors that are bounded."""
    shift = -factor.scale * module.running_mean.detach().double()  # type: ignore[operator]
    if module.bias is not None:
        shift = shift + module.bias.detach().double()  # type: ignore[operator]

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        ones = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(shift.to(x).view(ones), x, factor.scale.to(x).view(ones))

    return apply


def _linear_map(forward: Callable[..., Tensor], factor: Operator | Diagonal) -> Callable[..., Tensor]:
    """The linear map that a user's rule returned, with the module's offset added."""

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if isinstance(factor, Diagonal):
            y = x * factor.scale.to(x).view(-1, *(1,) * (x.dim() - 2))
        else:
            y = apply_operator(factor, x) if x.shape[1:] == factor.input_shape else x.new_zeros(0)
        shift = forward(torch.zeros_like(x[:1]))
        return y + shift if y.shape[1:] == shift.shape[1:] else y

    return apply


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _with_constants(function: Callable[..., Tensor], arguments: Sequence[Any]) -> Callable[..., Tensor]:
    """``function`` with the constants from which the bound was computed, whatever constants are passed later.

    A constant tensor that is passed in another shape, for instance with another batch size, is used as it is passed.
    """
    constants = {i: _copied(a) for i, a in enumerate(arguments) if not isinstance(a, fx.Node)}

    def apply(*args: Any) -> Tensor:
        first = next(a for i, a in enumerate(args) if i not in constants)
        chosen = []
        for i, now in enumerate(args):
            then = constants.get(i, now)
            if isinstance(then, Tensor) and isinstance(now, Tensor) and i in constants:
                then = now if now.shape != then.shape else then.to(now.device, now.dtype)
            chosen.append(then)
        result = function(*chosen)
        return result.to(first.dtype) if result.dtype != first.dtype else result

    return apply


def module_factor(
    module: nn.Module, name: str, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Factor:
    """The factor that a module's rule gives it on inputs of one shape and dtype; errors name the module."""
    found = find_rule(module)
    if found is None:
        raise missing_rule(type(module).__name__, name)
    try:
        require_continuous(module, dtype)
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


def _function_factor(
    rule: Rule, call: FunctionCall, name: str, where: str, input_shape: tuple[int, ...]
) -> float | NormInterval:
    """The factor that a function's rule gives a call of it; errors name the function."""
    try:
        factor = rule(call, input_shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if isinstance(factor, NormInterval):
        return factor
    if not isinstance(factor, (int, float)) or not 0.0 <= factor < math.inf:
        raise ValueError(f"the rule of {name} (at {where}) returned {factor}, not a finite bound >= 0 or NormInterval")
    return factor


def _scaling(constant: Any, power: int, source: Step, shape: tuple[int, ...], where: str) -> Factor:
    """Factor of a multiplication (power 1) or division (-1) by a number or tensor that does not depend on the input."""
    if isinstance(constant, fx.Node):
        raise missing_rule("a product of a traced tensor with itself", where)
    try:
        value = torch.as_tensor(constant, dtype=torch.float64) ** power
    except (RuntimeError, TypeError, ValueError):
        raise missing_rule(f"a factor that is {type(constant).__name__}", where) from None
    if shape != source.shape or not torch.isfinite(value).all():
        raise missing_rule("a factor that broadcasts the input or is not finite", where)
    channels = shape[0]
    # [C, 1, ..., 1] or [1, C, 1, ..., 1], the usual shapes of means and standard deviations.
    if value.numel() == channels > 1 and value.dim() >= len(shape) and value.shape[-len(shape)] == channels:
        return Diagonal(value.flatten().cpu())
    return value.abs().max().item() * (1.0 + 1e-15)


def fold_scales(last: Step) -> None:
    """Multiply factors per channel into the neighbouring layer with weights, before its norm is computed."""
    scales: dict[Step, dict[str, Tensor]] = {}
    for step in topological_order(last):
        if not isinstance(step.factor, Diagonal) or not step.exact:
            continue
        before, after = step.inputs[0], step.users[0] if len(step.users) == 1 else None
        if before.users == [step] and _takes_scale(before):
            scales.setdefault(before, {})["output_scale"] = step.factor.scale
            before.ahead = True
        elif after is not None and _takes_scale(after):
            scales.setdefault(after, {})["input_scale"] = step.factor.scale
            step.ahead = True
        else:
            continue
        step.factor, step.folded = 1.0, True
    for step, factors in scales.items():
        step.factor = _operator(step, **factors)
        step.scaled = True


def _operator(step: Step, **scales: Any) -> Operator:
    """The linear map of a layer with torch's own rule, for the shapes of its step."""
    assert step.module is not None
    return module_operator(step.module, step.inputs[0].shape, output_size=step.shape[1:], **scales)


def _takes_scale(step: Step) -> bool:
    """Whether the step is a layer with torch's own rule whose channels can be scaled."""
    return (
        isinstance(step.factor, Operator)
        and step.module is not None
        and find_rule(step.module) is weighted
        and (not isinstance(step.module, nn.Linear) or len(step.shape) == 1)
    )


def topological_order(last: Step) -> list[Step]:
    """All steps on which ``last`` depends, and itself, each after its inputs."""
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


def origin_of(step: Step, order: Mapping[Step, int]) -> Step:
    """The last step on every path from the model's input to ``step``; ``order`` as in :func:`topological_order`."""
    pending = set(step.inputs)
    while len(pending) > 1:
        latest = max(pending, key=lambda s: order[s])
        pending.remove(latest)
        pending.update(latest.inputs)
    return pending.pop()
