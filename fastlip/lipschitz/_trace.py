"""The graph of a model by torch.fx, and one run of that graph."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._registry import is_leaf, missing_rule
from fastlip.norms._models.inputs import Refused
from fastlip.norms._models.restore import as_found, version_of

#: Name of the model inside the module that is traced; it is removed from the names of layers.
_MODEL = "model"


class _Root(nn.Module):
    """Calls the model, so that its hooks, ``__call__`` and ``forward`` are traced like those of its submodules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Proxy(fx.Proxy):
    """Records augmented assignments as in place, unlike fx, because they also change other references to the tensor."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Treats modules with a rule as leaves, like torch's own, and records which module could not be traced."""

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
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class Values(fx.Interpreter):
    """Runs the graph once; keeps shape, dtype and device of tensors that depend on the input, and all other values.

    ``bundles`` are the tuples of tensors among those that depend on it.
    """

    def __init__(self, graph_module: fx.GraphModule, varying: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        self.devices: dict[fx.Node, torch.device] = {}
        self.bundles: dict[fx.Node, tuple[Any, ...]] = {}
        self.constants: dict[fx.Node, Any] = {}
        self._varying = varying
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        for source in n.all_input_nodes:
            if source in self._versions and version_of(self.env[source]) != self._versions[source]:
                raise Refused(
                    f"{location(source)} is used by {location(n)} after an in-place operation overwrote it, "
                    "so that the traced graph is not what runs; use inplace=False there"
                )
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._versions[n] = version_of(value)
        if isinstance(value, Tensor) and n in self._varying:
            self.shapes[n], self.dtypes[n], self.devices[n] = tuple(value.shape), value.dtype, value.device
        elif n in self._varying and isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            self.bundles[n] = tuple(value)
        elif n.op != "output":
            self.constants[n] = value
        return value


def trace_graph(model: nn.Module) -> fx.GraphModule:
    """The graph of a model in eval mode.

    Raises:
        ValueError: the model cannot be traced, or a module has no rule; the message names it.
    """
    tracer, root = _Tracer(), _Root(model)
    try:
        with as_found(model):  # a forward that stores a feature map stores a proxy now
            graph = tracer.trace(root)
    except Exception as error:
        failed = shown(tracer.failed)
        what = f"{type(model.get_submodule(failed)).__name__} (at {failed})" if failed else type(model).__name__
        raise ValueError(
            f"{what} cannot be traced by torch.fx ({error}); register a rule for the module, "
            "or write its forward without what depends on data"
        ) from error
    graph_module = fx.GraphModule(root, graph)
    for node in graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if not is_leaf(module):
            raise missing_rule(type(module).__name__, module_name(node, graph_module))
    return graph_module


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
