"""Tracing by torch.fx along a run on examples, so that a forward can ask for shapes, types and lengths."""

import builtins
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx
from torch.fx.proxy import Attribute, TraceError

from fastlip.norms._models.inputs import Refused
from fastlip.norms._models.restore import version_of

#: Methods and functions whose result depends on shapes and types alone.
_METADATA = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "type", "result_type"),
    }
)
#: Methods and functions that give the same tensor whatever numbers are in their first argument.
_FILLED = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
#: Methods that take nothing but a dtype and a device from other tensors.
_CONVERTED = frozenset({"to", "type_as"})
_OPERATORS = {
    f"__{name}__": getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "getitem")
}


@dataclass(frozen=True)
class Described:
    """A tensor's shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class InPlaceProxy(fx.Proxy):
    """Augmented assignments are recorded as in place, unlike fx's, as they change other references to a tensor too."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class InPlaceTracer(fx.Tracer):
    """torch.fx's own tracer, which knows no values, but for augmented assignments."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)


class Proxy(InPlaceProxy):
    """Stands for a tensor, or a tuple of tensors, in a forward, and passes for one in its ``isinstance``.

    It knows its values for all examples. Where these agree on a number, a shape or a type, the forward is given that.
    """

    tracer: "Tracer"

    def __init__(self, node: fx.Node, tracer: "Tracer", values: tuple[Any, ...]) -> None:
        super().__init__(node, tracer)
        self.of_examples = values
        self.versions_then = tuple(version_of(t) for t in _tensors(values))

    def __getattr__(self, k: str) -> Any:
        if k in ("of_examples", "versions_then", "node", "tracer"):  # not set yet
            raise AttributeError(k)
        found = [getattr(value, k) for value in self.of_examples]
        if callable(found[0]):
            return Attribute(self, k)
        if k == "shape":
            return self.tracer.sizes(self)
        if isinstance(self.of_examples[0], tuple) and isinstance(found[0], Tensor):  # a field of a named tuple
            return self.part(next(i for i, value in enumerate(self.of_examples[0]) if value is found[0]))
        if k == "T":
            return self.permute(*range(self.dim())[::-1])
        if k in ("mT", "mH"):
            return self.transpose(-2, -1)
        if k == "data":
            return self.detach()
        if isinstance(found[0], Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        if any(value != found[0] for value in found):
            raise TraceError(f"{k} of {self.node.name} is not the same for all batch sizes")
        return found[0]

    def __iter__(self) -> Iterator[Any]:
        return iter([self.part(i) for i in range(len(self))])

    def part(self, i: int) -> Any:
        """The i-th element of a tuple, or entry along a tensor's first axis."""
        return self.tracer.create_proxy("call_function", operator.getitem, (self, i), {})

    def __len__(self) -> int:
        return cast("int", self.tracer.agreed(self, [len(value) for value in self.of_examples], "length"))

    def __bool__(self) -> bool:
        return bool(self.tracer.agreed(self, self.of_examples, "truth"))

    def __index__(self) -> int:
        return operator.index(self.tracer.agreed(self, self.of_examples, "value"))

    def __int__(self) -> int:
        return int(self.tracer.agreed(self, self.of_examples, "value"))

    def __float__(self) -> float:
        return float(self.tracer.agreed(self, self.of_examples, "value"))


class Tracer(fx.Tracer):
    """Records what a forward does with a batch, while it runs on examples of one or several batch sizes.

    With one example all sizes are numbers, and what does not depend on the input is computed at once: the graph is that
    of batches of this size. With several, a size that differs between them stays in the graph, as do parameters.

    Args:
        examples: inputs, [B, ...] each.
        leaf: which modules are called as they are, besides those of ``torch.nn``.

    Attributes:
        described: for each node what :func:`described` says of its value for the first example.
        constants: the tensors of nodes that do not depend on the input.
        failed: the qualified name of the innermost module whose forward could not be traced.
    """

    def __init__(self, examples: Sequence[Tensor], leaf: Callable[[nn.Module], bool] | None = None) -> None:
        super().__init__()
        self.examples = tuple(examples)
        self.described: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        self.failed = ""
        self._leaf = leaf
        self._running = False
        self._forward: Callable[..., Any] | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _inside_autograd_functions(), _passing_for_tensors():
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (self._leaf is not None and self._leaf(m)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        if not any(isinstance(a, fx.Proxy) for a in _flat((args, kwargs))):
            return self._on_values(forward, args, kwargs)[0] if len(self.examples) == 1 else forward(*args, **kwargs)
        try:
            self._forward = forward
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._running or len(self.examples) == 1:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if type(a) is Proxy:
            if a.versions_then != tuple(version_of(t) for t in _tensors(a.of_examples)):
                raise Refused(
                    f"{self.location(a.node)} is used after an in-place operation overwrote it, so that the traced "
                    "graph is not what runs; use inplace=False there"
                )
            return a.node
        if type(a) is Attribute:
            raise TraceError(f"a method ({a.attr}) is passed on without a call")
        if type(a) is torch.Size:
            return tuple(a)
        if isinstance(a, nn.Parameter) and all(a is not p for p in self.root.parameters()):
            a = a.detach()  # one that is put in place of the module's for the call
        arg = super().create_arg(a)
        if isinstance(a, Tensor) and isinstance(arg, fx.Node):
            self.constants[arg] = a
        return arg

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *others: Any, **settings: Any
    ) -> Any:
        if kind == "call_method" and target in _OPERATORS:
            kind, target = "call_function", _OPERATORS[target]
        if kind == "call_method" and target == "size" and not kwargs and len(args) == 1:
            return self.sizes(args[0])
        if target is not operator.getitem:
            args, kwargs = _spread(args), _spread(kwargs)
        arguments = _flat((args, kwargs))
        written = [(t, version_of(t)) for t in arguments if type(t) is not Proxy and isinstance(t, Tensor)]
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if len(self.examples) == 1 and _is_constant(kind, target, args):
            return self._on_values(_function(kind, target), args, kwargs)[0]
        node = super().create_proxy(kind, target, args, kwargs, *others, **settings).node
        try:
            values = self._run(kind, target, args, kwargs)
            if any(version_of(t) != version for t, version in written):
                raise TraceError(f"{name} writes into a tensor that does not depend on the input")
            if all(isinstance(a, Tensor) for value in values for a in _flat(value, empty=(None,))):
                self.described[node] = described(values[0])
                return Proxy(node, self, values)
            if any(_holds_tensor(a) for a in arguments) and name not in _METADATA:
                raise TraceError(f"{name} returns {type(values[0]).__name__}, which depends on data")
        except BaseException:
            self.graph.erase_node(node)
            raise
        if all(value == values[0] for value in values):
            self.graph.erase_node(node)
            return values[0]
        return Proxy(node, self, values)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self)  # create_proxy makes its own of it

    def sizes(self, proxy: Proxy) -> Any:
        """The shape of a tensor; sizes that are not the same for all examples are numbers of the graph."""
        shapes = [value.shape for value in proxy.of_examples]
        if all(shape == shapes[0] for shape in shapes):
            return shapes[0]
        return tuple(self.create_proxy("call_method", "size", (proxy, axis), {}) for axis in range(len(shapes[0])))

    def agreed(self, proxy: Proxy, values: Sequence[Any], what: str) -> Any:
        """The number that all examples have; raises TraceError where there is none, or where it depends on data."""
        if isinstance(values[0], Tensor):
            raise TraceError(f"the {what} of {proxy.node.name}, which depends on data, decides what the forward does")
        if any(value != values[0] for value in values):
            raise TraceError(f"the {what} of {proxy.node.name} is not the same for all batch sizes")
        return values[0]

    def location(self, node: fx.Node) -> str:
        """What errors call a node."""
        return node.name

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        if kind == "placeholder":
            return self.examples
        if kind == "get_attr":
            return self._on_values(lambda: operator.attrgetter(target)(self.root), (), {})
        if kind == "call_module":
            assert self._forward is not None
            return self._on_values(self._forward, args, kwargs)
        return self._on_values(_function(kind, target), args, kwargs)

    def _on_values(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
        results = []
        running, self._running = self._running, True
        try:
            for i in range(len(self.examples)):
                own, named = _replaced((args, kwargs), i)
                results.append(function(*own, **named))
        finally:
            self._running = running
        return tuple(results)


@contextmanager
def _inside_autograd_functions() -> Iterator[None]:
    """Trace the forward of functions with a backward of their own, which torch does not call with proxies."""
    found = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(type(a) is Proxy for a in _flat((args, kwargs))):
            return found.__get__(None, cls)(*args, **kwargs)
        sets_up = cls.setup_context is not torch.autograd.Function.setup_context
        return cls.forward(*(() if sets_up else (FunctionCtx(),)), *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = found


@contextmanager
def _passing_for_tensors() -> Iterator[None]:
    """Let ``isinstance`` take proxies for what they stand for, in Python alone.

    With ``__class__`` C code would take them for tensors as well, and read memory that is not there.
    """
    found = builtins.isinstance

    def passes(value: Any, kinds: Any, /) -> bool:
        if type(value) is not Proxy:
            return found(value, kinds)
        examples = vars(value).get("of_examples", ())
        return found(value, kinds) or any(found(example, kinds) for example in examples[:1])

    builtins.isinstance = passes
    try:
        yield
    finally:
        builtins.isinstance = found


def _function(kind: str, target: Any) -> Callable[..., Any]:
    if kind == "call_function":
        return cast("Callable[..., Any]", target)
    return lambda x, *args, **kwargs: getattr(x, target)(*args, **kwargs)


def _flat(value: Any, empty: tuple[Any, ...] = ()) -> list[Any]:
    """The items of nested tuples, lists, dicts and slices; ``empty`` in place of those of an empty one."""
    if type(value) is Proxy:
        return [value]
    if isinstance(value, slice):
        return _flat((value.start, value.stop, value.step))
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        return [value]
    return [item for inner in value for item in _flat(inner)] or list(empty)


def _spread(value: Any) -> Any:
    """``value`` with the parts of tuples in place of proxies of tuples."""
    if type(value) is Proxy:
        return tuple(value) if isinstance(value.of_examples[0], (tuple, list)) else value
    if isinstance(value, dict):
        return {k: _spread(v) for k, v in value.items()}
    return type(value)(map(_spread, value)) if type(value) in (tuple, list) else value


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in _flat(values) if isinstance(t, Tensor)]


def _is_constant(kind: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call takes no more than shapes, a dtype or a device from what is traced."""
    if kind == "call_function":
        name = getattr(target, "__name__", "")
        return name in _FILLED and target is getattr(torch, name, None)
    return kind == "call_method" and (target in _FILLED or (target in _CONVERTED and type(args[0]) is not Proxy))


def _holds_tensor(argument: Any) -> bool:
    return type(argument) is Proxy and bool(_tensors(argument.of_examples))


def _replaced(value: Any, i: int) -> Any:
    """``value`` with the i-th example's values in place of proxies."""
    if type(value) is Proxy:
        return value.of_examples[i]
    if isinstance(value, slice):
        return slice(*(_replaced(v, i) for v in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {k: _replaced(v, i) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_replaced(v, i) for v in value)
    return value


def described(value: Any) -> Any:
    """A value with descriptions in place of tensors, also in tuples and lists, which become tuples."""
    if isinstance(value, Tensor):
        return Described(tuple(value.shape), value.dtype, value.device)
    return tuple(described(inner) for inner in value) if isinstance(value, (tuple, list)) else value
