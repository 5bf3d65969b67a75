"""Calls in a traced graph, of which builders make steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fastlip.lipschitz._steps import Step, in_graph, in_sample
from fastlip.lipschitz._trace import Values, location, module_name
from fastlip.norms._models.tracing import Described


@dataclass(frozen=True, eq=False)
class Made:
    """The steps made so far, of the nodes that are tensors and of those that are tuples of tensors.

    Attributes:
        steps: of each node that is a tensor.
        bundles: of each that is a tuple, None for a part that has none, such as the indices of a maximum.
        without: such parts, which nothing can be made of, and the tuples that they are of.
    """

    steps: dict[fx.Node, Step]
    bundles: dict[fx.Node, tuple[Step | None, ...]]
    without: dict[fx.Node, fx.Node] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module, function or method in the graph, some of whose arguments depend on the model's input.

    Attributes:
        node: the node of the graph.
        target: the module, the function, or the name of the tensor method.
        name: class of the module, or name of the function.
        where: qualified name of the module, or of the one in which the function is called and the node's name.
        args: the positional arguments: nodes where they depend on the input, otherwise values.
        kwargs: the keyword arguments, likewise.
        sources: the steps of the traced tensors among the arguments, each once, also inside lists.
        shape: shape of one output sample; empty if the call returns a tuple.
        steps: the steps of all nodes before this one that are tensors.
        bundles: the steps of all nodes before this one that are tuples of tensors.
        values: the run from which shapes and constants come.
    """

    node: fx.Node
    target: Any
    name: str
    where: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[Step]
    shape: tuple[int, ...]
    steps: dict[fx.Node, Step]
    bundles: dict[fx.Node, tuple[Step | None, ...]]
    values: Values

    @property
    def part_shapes(self) -> list[tuple[int, ...] | None]:
        """Shape of one sample of each tensor in the tuple that the call returns, None for what is no tensor."""
        parts = self.values.bundles.get(self.node, ())
        return [self.values.without_batch(part.shape) if isinstance(part, Described) else None for part in parts]

    @property
    def on_one(self) -> bool:
        """Whether the first positional argument is the only one that is a traced tensor."""
        return len(self.sources) == 1 and bool(self.args) and isinstance(self.args[0], fx.Node)

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype of the first traced tensor."""
        return next(self.values.dtypes[n] for n in self.node.all_input_nodes if n in self.steps)

    @property
    def source_device(self) -> torch.device:
        """The device of the first traced tensor."""
        return next(self.values.devices[n] for n in self.node.all_input_nodes if n in self.steps)

    @property
    def rank(self) -> int:
        """Number of axes of the output, that of the batch among them."""
        return len(self.values.shapes[self.node])

    @property
    def alone(self) -> bool:
        """Whether the output's first axis can be the batch's."""
        return self.values.alone(self.values.shapes[self.node])

    def sample_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of one sample of a traced tensor."""
        return self.values.sample_shape(node)


def module_call(node: fx.Node, graph_module: fx.GraphModule, made: Made, values: Values) -> Call:
    """The call of a module in a graph."""
    module = graph_module.get_submodule(str(node.target))
    return _call(node, module, type(module).__name__, module_name(node, graph_module), made, values)


def function_call(node: fx.Node, made: Made, values: Values) -> Call:
    """The call of a function or tensor method in a graph."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return _call(node, target, name, location(node), made, values)


def _call(node: fx.Node, target: Any, name: str, where: str, made: Made, values: Values) -> Call:
    args: Any = fx.node.map_arg(node.args, lambda n: values.constants.get(n, n))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values.constants.get(n, n))
    parts = (made.steps.get(n) or part for n in node.all_input_nodes for part in made.bundles.get(n, (None,)))
    sources = list(dict.fromkeys(part for part in parts if part is not None))
    shape = values.sample_shape(node) if node in values.shapes else ()
    return Call(node, target, name, where, args, kwargs, sources, shape, made.steps, made.bundles, values)


def has_all_values(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype has all values of another, of floating point as well."""
    if not dtype.is_floating_point:
        return False
    try:
        return torch.promote_types(dtype, other) == dtype
    except RuntimeError:  # as for those of 8 bits
        return dtype == other


def as_function(target: Any) -> Callable[..., Tensor]:
    """A traced target as a function of its arguments; a target that is a string names a tensor method."""
    if not isinstance(target, str):
        function: Callable[..., Tensor] = target
        return function
    return lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)


def dense(t: Tensor) -> Tensor:
    """A tensor in the usual layout, such as a matrix of which sparse entries are stored."""
    return t if t.layout == torch.strided else t.to_dense()


def copied(value: Any) -> Any:
    """A copy of a tensor, or the value itself."""
    return value.clone() if isinstance(value, Tensor) else value


def with_constants(function: Callable[..., Tensor], arguments: Sequence[Any]) -> Callable[..., Tensor]:
    """``function`` with the constants from which the bound was computed, whatever constants are passed later.

    A constant tensor that is passed in another shape, for instance with another batch size, is used as it is passed.
    """
    constants = {i: copied(a) for i, a in enumerate(arguments) if not isinstance(a, fx.Node)}

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


def places_of(step: Step, call: Call) -> Callable[[], Tensor] | None:
    """Where what a step moves comes from; None among several samples, from one of which to another it may move."""
    if call.values.batch > 1:
        return None
    (source,) = step.inputs
    settings = {key: value for key, value in call.kwargs.items() if not isinstance(value, fx.Node)}

    def places() -> Tensor:
        numbers = torch.arange(math.prod(source.shape), dtype=torch.float64).view(1, *source.shape)
        return in_sample(step.apply(in_graph(numbers, source, 1), *call.args[1:], **settings), step).flatten().long()

    return places
