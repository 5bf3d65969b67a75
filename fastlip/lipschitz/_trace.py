"""The graph of a model, and one run of that graph.

The graph is that of a batch of one sample, or of two where the model does not run on one. Each of its steps is a
function of the whole batch, wherever a tensor has the batch axis: alone in front, behind others (queries, keys and
values), or folded into others (windows, heads). That the samples of larger batches do not depend on one another is
checked on the model.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._registry import body_of, is_leaf, is_traced_into, missing_rule
from fastlip.norms._models.inputs import Refused
from fastlip.norms._models.outputs import tensor_in
from fastlip.norms._models.restore import as_found
from fastlip.norms._models.tracing import Described, Tracer

#: Name of the model inside the module that is traced; it is removed from the names of layers.
_MODEL = "model"


class Root(nn.Module):
    """Calls the model, so that its hooks, ``__call__`` and ``forward`` are traced like those of its submodules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return tensor_in(self.model(x))


def run_model(model: nn.Module, x: Tensor, after: Tensor | None = None) -> Any:
    """The output of the model on a copy of x, at once or after a run on other inputs; restores the model's state."""
    with as_found(model):
        if after is not None:
            model(after.clone())
        return tensor_in(model(x.clone()))


class Values:
    """What the nodes of a graph gave in the run along which it was traced.

    Attributes:
        shapes: shapes of the tensors that depend on the input, with all axes.
        dtypes: their dtypes.
        devices: their devices.
        bundles: the tuples that depend on the input, of descriptions in place of tensors, nested as they are.
        others: what else depends on it, such as numbers.
        constants: all other values.
        batch: the number of samples in the input.
    """

    def __init__(self, described: dict[fx.Node, Any], constants: dict[fx.Node, Any], batch: int) -> None:
        tensors = {node: value for node, value in described.items() if isinstance(value, Described)}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {node: value.shape for node, value in tensors.items()}
        self.dtypes: dict[fx.Node, torch.dtype] = {node: value.dtype for node, value in tensors.items()}
        self.devices: dict[fx.Node, torch.device] = {node: value.device for node, value in tensors.items()}
        self.bundles = {node: value for node, value in described.items() if isinstance(value, tuple)}
        self.others = {node: value for node, value in described.items() if not isinstance(value, (Described, tuple))}
        self.constants = constants
        self.batch = batch

    def alone(self, shape: tuple[int, ...]) -> bool:
        """Whether the first axis of a tensor of this shape can be the batch's."""
        return shape[:1] == (self.batch,)

    def without_batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape without its first axis if that can be the batch's."""
        return shape[1:] if self.alone(shape) else shape

    def sample_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a tensor that depends on the input, without the batch axis."""
        return self.without_batch(self.shapes[node])


class Untraceable(ValueError):
    """A model of which a way of tracing makes no graph."""


class _Tracer(Tracer):
    """Treats modules with a rule as leaves, like most of torch's own, and traces into functions without one."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) and (is_leaf(m) or not is_traced_into(m))

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *others: Any, **settings: Any
    ) -> Any:
        body = body_of(target) if kind in ("call_function", "call_method") else None
        if body is not None:
            try:
                return body(*args, **kwargs)
            except NotImplementedError:
                pass
        return super().create_proxy(kind, target, args, kwargs, *others, **settings)

    def location(self, node: fx.Node) -> str:
        return location(node)


def _compute_weights(model: nn.Module, x: Tensor) -> None:
    """Have hooks compute weights, which rules have to see; what else a run leaves behind is undone."""
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    if not hooked:
        return
    with as_found(model):
        model(x.clone())
        computed = [(m, name, value) for m in hooked for name, value in vars(m).items() if isinstance(value, Tensor)]
    for module, name, value in computed:
        vars(module)[name] = value


def trace_graph(
    model: nn.Module,
    x: Tensor,  # [B, ...]
) -> tuple[fx.GraphModule, Values]:
    """The graph of a model in eval mode for batches of the size of x, by torch.fx.

    Raises:
        Untraceable: it cannot be traced.
        Refused: a tensor is used after an in-place operation overwrote it.
        MissingRule: a module has no rule; the message names it.
    """
    tracer, root = _Tracer([x], is_leaf), Root(model)
    try:
        with as_found(model):  # a forward that stores a feature map stores a proxy now
            graph = tracer.trace(root)
    except Refused:
        raise
    except Exception as error:
        failed = shown(tracer.failed)
        what = f"{type(model.get_submodule(failed)).__name__} (at {failed})" if failed else type(model).__name__
        raise Untraceable(f"{what} cannot be traced by torch.fx ({error or type(error).__name__})") from error
    _compute_weights(model, x)
    for node in graph.nodes:  # what a function that was traced into returned must not pass for a call of it
        node.meta.pop("is_wrapped", None)
    _drop_unused(graph)
    graph_module = fx.GraphModule(root, graph)
    for node in graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if not is_leaf(module):
            raise missing_rule(type(module).__name__, module_name(node, graph_module))
    varying = varying_nodes(graph)
    return graph_module, Values({n: v for n, v in tracer.described.items() if n in varying}, tracer.constants, len(x))


def _drop_unused(graph: fx.Graph) -> None:
    """Erase calls of functions whose results nothing reads."""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "call_method", "get_attr") and not node.users:
            graph.erase_node(node)


def varying_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The input, and all nodes that depend on it."""
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and not node.args) or any(source in varying for source in node.all_input_nodes):
            varying.add(node)
    return varying


def module_name(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """Qualified name of a called module in the model, or the class of the model if it is the model itself."""
    return shown(str(node.target)) or type(graph_module.get_submodule(str(node.target))).__name__


def shown(path: str) -> str:
    """The name in the model of a module whose name in the traced root is ``path``."""
    return path.removeprefix(_MODEL).removeprefix(".")


def location(node: fx.Node) -> str:
    """The module in which a function is called, and the node's name; for a called module its own name."""
    stack = node.meta.get("nn_module_stack")
    path = shown(next(reversed(stack))) if stack else ""
    return f"{path}.{node.name}" if path else node.name
