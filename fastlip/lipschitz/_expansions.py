"""Calls that are replaced in the graph by what they do, as a graph of functions that have rules."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from fastlip.norms._models.hooks import is_hooked
from fastlip.norms._operators.modules import keeps_forward

if TYPE_CHECKING:
    from fastlip.lipschitz._trace import Values


@dataclass(frozen=True, eq=False)
class Site:
    """A call in a graph that is about to be replaced.

    Attributes:
        node: the node of the call.
        module: the module called; None for a function.
        args: its positional arguments, nodes as proxies, whose operations become nodes before the call.
        kwargs: its keyword arguments, likewise.
        graph_module: the graph's module.
        values: the run from which shapes and constants come, with a batch of two samples.
    """

    node: fx.Node
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    graph_module: fx.GraphModule
    values: "Values"

    def parameter(self, name: str) -> Any:
        """A parameter of the module called."""
        return self._proxy(self.node.graph.get_attr(f"{self.node.target}.{name}"))

    def constant(self, value: Tensor) -> Any:
        """A tensor that does not depend on the model's input."""
        name = f"_{self.node.name}_constant_{len(self.node.graph.nodes)}"
        self.graph_module.register_buffer(name, value)
        return self._proxy(self.node.graph.get_attr(name))

    def sample_shape(self, proxy: fx.Proxy) -> tuple[int, ...]:
        """Shape of one sample of an argument that depends on the model's input."""
        return self.values.shapes[proxy.node][1:]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """A call of a function that is not torch's."""
        tracer = self.args[0].tracer
        return fx.Proxy(tracer.create_node("call_function", function, tracer.create_arg(args), {}), tracer)

    def _proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self.args[0].tracer)


#: Makes of a call what it returns, or None if it is not of its kind.
Expansion = Callable[[Site], Any]

_EXPANSIONS: dict[Any, Expansion] = {}


def expands(*targets: type[nn.Module] | str) -> Callable[[Expansion], Expansion]:
    """Register what replaces calls of module classes, and of functions by qualified name."""

    def register(expansion: Expansion) -> Expansion:
        _EXPANSIONS.update(dict.fromkeys(targets, expansion))
        return expansion

    return register


def expandable(module: nn.Module) -> bool:
    """Whether calls of a module may be replaced."""
    return any(cls in _EXPANSIONS and keeps_forward(module, cls) for cls in type(module).__mro__)


def expand(graph_module: fx.GraphModule, values: "Values") -> bool:
    """Replace calls in a graph by what they do; returns whether there were any."""
    replaced = False
    for node in list(graph_module.graph.nodes):
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        expansion = _expansion(node, module)
        traced = node.args and isinstance(node.args[0], fx.Node) and node.args[0] in values.shapes
        if expansion is None or not traced or (module is not None and is_hooked(module)):
            continue
        last = node.prev
        with graph_module.graph.inserting_before(node):
            tracer = fx.proxy.GraphAppendingTracer(graph_module.graph)
            args: Any = fx.node.map_aggregate(node.args, partial(_proxied, tracer))
            kwargs: Any = fx.node.map_aggregate(node.kwargs, partial(_proxied, tracer))
            result = expansion(Site(node, module, args, kwargs, graph_module, values))
        done = result is not None and _replace(node, result)
        while (new := node.prev) is not last and not done:
            graph_module.graph.erase_node(new)
        if done:
            while new is not last:
                new.meta.update(node.meta)
                new = new.prev
            graph_module.graph.erase_node(node)
            replaced = True
    return replaced


def _proxied(tracer: fx.proxy.TracerBase, value: Any) -> Any:
    return fx.Proxy(value, tracer) if isinstance(value, fx.Node) else value


def _expansion(node: fx.Node, module: nn.Module | None) -> Expansion | None:
    if module is not None:
        kinds = (cls for cls in type(module).__mro__ if cls in _EXPANSIONS and keeps_forward(module, cls))
        return next((_EXPANSIONS[cls] for cls in kinds), None)
    if node.op != "call_function":
        return None
    place, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "")
    return _EXPANSIONS.get(f"{place}.{name}")


def _replace(node: fx.Node, result: Any) -> bool:
    """Let what uses a call use its replacement; False if something uses a part that there is not."""
    if isinstance(result, fx.Proxy):
        node.replace_all_uses_with(result.node)
        return True
    users: list[tuple[fx.Node, Any]] = []
    for user in node.users:
        index = user.args[1] if user.target is operator.getitem else None
        part = result[index] if isinstance(index, int) else None
        if not isinstance(part, fx.Proxy) and user.users:
            return False
        users.append((user, part))
    for user, part in users:
        if isinstance(part, fx.Proxy):
            user.replace_all_uses_with(part.node)
        node.graph.erase_node(user)
    return True
