"""The graph of a model by torch.export, in the terms of torch.fx: modules with a rule, functions and tensor methods."""

import io
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from fastlip.lipschitz._registry import is_leaf
from fastlip.lipschitz._trace import Root, Untraceable, Values, location, varying_nodes
from fastlip.norms._constrain.transforms import own_export
from fastlip.norms._models.inputs import Refused
from fastlip.norms._models.restore import as_found, version_of
from fastlip.norms._models.tracing import described

#: A function or the name of a tensor method, and its arguments.
_Written = tuple[Any, tuple[Any, ...], dict[str, Any]]


def export_graph(
    model: nn.Module,
    x: Tensor,  # [B, ...]
) -> tuple[fx.GraphModule, Values]:
    """The graph of a model in eval mode for batches of the size of x, by torch.export.

    Its parameters and buffers are those of the model. What a module with a rule does is one call of that module.

    Raises:
        Untraceable: it cannot be exported.
    """
    root = Root(model)
    try:
        with as_found(model), _registration_hooks_as_found(), _quiet(), own_export():
            program = torch.export.export(root, (x,), strict=False)
            graph_module = _in_calls(program, root)
            try:
                return graph_module, _values(graph_module, x)
            except Refused:  # what is overwritten has another name
                graph_module = _in_calls(program.run_decompositions({}), root)
            return graph_module, _values(graph_module, x)
    except Refused:
        raise
    except Exception as error:
        line = next(iter(f"{error}".strip().splitlines()), "") or type(error).__name__
        raise Untraceable(f"{type(model).__name__} cannot be exported by torch.export ({line})") from error


@contextmanager
def _registration_hooks_as_found() -> Iterator[None]:
    """Remove the hooks for all modules that torch.export of torch 2.11 leaves behind where it fails."""
    hooks = [
        torch_module._global_buffer_registration_hooks,
        torch_module._global_module_registration_hooks,
        torch_module._global_parameter_registration_hooks,
    ]
    found = [set(of_one_kind) for of_one_kind in hooks]
    try:
        yield
    finally:
        for of_one_kind, kept in zip(hooks, found, strict=True):
            for key in set(of_one_kind) - kept:
                del of_one_kind[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.export prints of a model that it cannot export, graphs and all, from standard error."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


class _Run(fx.Interpreter):
    """Runs a graph once; describes what depends on the input and keeps all other values.

    Raises:
        Refused: a value is used after an in-place operation overwrote it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.described: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Any] = {}
        self._varying = varying_nodes(graph_module.graph)
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        for source in n.all_input_nodes:
            if source in self._versions and version_of(self.env[source]) != self._versions[source]:
                raise Refused(f"{location(source)} is used by {location(n)} after an in-place operation overwrote it")
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._versions[n] = version_of(value)
        if n.op != "output":
            if n in self._varying:
                self.described[n] = described(value)
            else:
                self.constants[n] = value
        return value


def _values(graph_module: fx.GraphModule, x: Tensor) -> Values:
    run = _Run(graph_module)
    with torch.no_grad():
        run.run(x.clone())
    # Only now, because what nothing reads may have written into what something does.
    graph_module.graph.eliminate_dead_code()
    kept = set(graph_module.graph.nodes)
    for values in (run.described, run.constants):
        for node in values.keys() - kept:
            del values[node]
    return Values(run.described, run.constants, len(x))


def _in_calls(program: torch.export.ExportedProgram, root: Root) -> fx.GraphModule:
    """An exported program as a graph of calls on ``root``."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in held:
                known[node] = graph.get_attr(held[node.name])
            elif node.name in lifted:
                name = f"_constant_{node.name}"
                setattr(root, name, program.constants[lifted[node.name]])
                known[node] = graph.get_attr(name)
            else:
                known[node] = graph.placeholder(node.name)
        elif node.op == "output":
            result = node.args[0][-1]
            graph.output(known[result] if isinstance(result, fx.Node) else result)
        elif node.target is operator.getitem and _name(node.args[0]) in _FIRST and node.args[1] == 0:
            known[node] = known[node.args[0]]
        elif node.op == "call_function" and not getattr(node.target, "__name__", "").startswith("_assert"):
            target, args, kwargs = _written(node)
            args, kwargs = fx.node.map_arg((args, kwargs), known.__getitem__)
            made = graph.call_method if isinstance(target, str) else graph.call_function
            known[node] = made(target, args, kwargs)
            stack = (node.meta.get("nn_module_stack") or {}).items()
            known[node].meta["nn_module_stack"] = {path: kind for _, (path, kind) in stack}
            known[node].meta["calls"] = [(key, path) for key, (path, _) in stack]
    graph_module = fx.GraphModule(root, graph)
    _group(graph_module, root)
    return graph_module


def _group(graph_module: fx.GraphModule, root: Root) -> None:
    """Replace what a module with a rule does by a call of that module, where it takes one tensor and gives one."""
    groups: dict[str, list[fx.Node]] = {}
    targets: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        for key, path in node.meta.get("calls", ()):
            if path and is_leaf(root.get_submodule(path)):
                groups.setdefault(key, []).append(node)
                targets[key] = path
                break
    varying = varying_nodes(graph_module.graph)
    for key, nodes in groups.items():
        inside = set(nodes)
        taken = {s for n in nodes for s in n.all_input_nodes if s in varying and s not in inside}
        given = [n for n in nodes if any(user not in inside for user in n.users)]
        if len(taken) != 1 or len(given) != 1:
            continue
        graph_module.set_submodule(targets[key], root.get_submodule(targets[key]))
        with graph_module.graph.inserting_after(given[0]):
            call = graph_module.graph.call_module(targets[key], (taken.pop(),))
        call.meta = dict(given[0].meta)
        varying.add(call)  # what the next module may take
        given[0].replace_all_uses_with(call)
        for node in reversed(nodes):
            graph_module.graph.erase_node(node)


def _name(node: Any) -> str:
    """The name of an operator of torch that a node calls; empty for other nodes, and for operators of others."""
    target = node.target if isinstance(node, fx.Node) else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.split("::")[-1]


def _written(node: fx.Node) -> _Written:
    """An exported call as one would write it in Python."""
    target, kwargs = node.target, dict(node.kwargs)
    name, args = _name(node), tuple(node.args)
    if not name or not isinstance(target, torch._ops.OpOverload):
        return target, args, kwargs
    if name in _REWRITTEN:
        rest = target._schema.arguments[len(args) :]
        given = [*args, *(kwargs.get(a.name, a.default_value) for a in rest)]
        return _REWRITTEN[name](*given)
    for place in (torch, F):
        if (function := getattr(place, name, None)) is not None:
            return function, args, kwargs
    if hasattr(Tensor, name):
        return name, args, kwargs
    return target, args, kwargs


def _axis_slice(dim: int, start: Any, end: Any, step: int, axes: int) -> tuple[Any, ...]:
    return (*(slice(None),) * (dim % axes), slice(start, end, None if step == 1 else step))


def _axes(x: fx.Node) -> int:
    return x.meta["val"].dim()


def _index(x: fx.Node, indices: Sequence[Any]) -> _Written:
    return operator.getitem, (x, tuple(slice(None) if i is None else i for i in indices)), {}


def _resized(mode: str, *, corners: bool, smooth: bool = False) -> Callable[..., _Written]:
    def write(x: Any, size: Any, *rest: Any) -> _Written:
        align, scale = (rest[0], rest[1]) if corners else (None, rest[0])
        scale = tuple(scale) if size is None else None
        options: dict[str, Any] = {"mode": mode, "align_corners": align}
        if smooth:
            options["antialias"] = True
        return F.interpolate, (x, None if size is None else tuple(size), scale), options

    return write


def _to(x: Any, *rest: Any) -> _Written:
    dtype = next((a for a in rest if isinstance(a, torch.dtype)), None)
    return ("to", (x, dtype), {}) if dtype is not None else ("contiguous", (x,), {})


def _convolution(x: Any, w: Any, b: Any, s: Any, p: Any, d: Any, transposed: bool, o: Any, g: int) -> _Written:
    axes = len(s)
    if transposed:
        return getattr(F, f"conv_transpose{axes}d"), (x, w, b, s, p, o, g, d), {}
    return getattr(F, f"conv{axes}d"), (x, w, b, s, p, d, g), {}


def _pool(name: str) -> Callable[..., _Written]:
    function = getattr(F, name)
    return lambda x, kernel, stride, *rest: (function, (x, kernel, stride or None, *rest), {})


_PADDINGS = {"reflection": "reflect", "replication": "replicate"}
_SMOOTH = (("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3))


def _padded(mode: str) -> Callable[..., _Written]:
    return lambda x, pad: (F.pad, (x, pad, mode), {})


#: Operators of whose results only the first is wanted, and written.
_FIRST = ("_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm")

#: From an operator's arguments, all of them, to the call.
_REWRITTEN: dict[str, Callable[..., _Written]] = {
    "batch_norm": lambda x, w, b, mean, var, training, momentum, eps, _: (
        F.batch_norm,
        (x, mean, var, w, b, training, momentum, eps),
        {},
    ),
    "_native_batch_norm_legit_no_training": lambda x, w, b, mean, var, momentum, eps: (
        F.batch_norm,
        (x, mean, var, w, b, False, momentum, eps),
        {},
    ),
    "native_layer_norm": lambda x, shape, w, b, eps: (F.layer_norm, (x, shape, w, b, eps), {}),
    "native_group_norm": lambda x, w, b, n, c, size, groups, eps: (F.group_norm, (x, groups, w, b, eps), {}),
    "layer_norm": lambda x, shape, w, b, eps, _: (F.layer_norm, (x, shape, w, b, eps), {}),
    "group_norm": lambda x, groups, w, b, eps, _: (F.group_norm, (x, groups, w, b, eps), {}),
    "rms_norm": lambda x, shape, w, eps: (F.rms_norm, (x, shape, w, eps), {}),
    "instance_norm": lambda x, w, b, mean, var, own, momentum, eps, _: (
        F.instance_norm,
        (x, mean, var, w, b, own, momentum, eps),
        {},
    ),
    "slice": lambda x, dim, start, end, step: (
        operator.getitem,
        (x, _axis_slice(dim, start, end, step, _axes(x))),
        {},
    ),
    "index": _index,
    "split_with_sizes": lambda x, sizes, dim: (torch.split, (x, sizes, dim), {}),
    "einsum": lambda equation, tensors, _: (torch.einsum, (equation, *tensors), {}),
    "scaled_dot_product_attention": lambda q, k, v, mask, p, causal, scale, gqa: (
        F.scaled_dot_product_attention,
        (q, k, v, mask, p, causal),
        {"scale": scale, "enable_gqa": gqa},
    ),
    "pad": lambda x, pad, mode, value: (F.pad, (x, pad, mode, value), {}),
    "constant_pad_nd": lambda x, pad, value: (F.pad, (x, pad, "constant", value), {}),
    "dropout": lambda x, p, training: (F.dropout, (x, p, training), {}),
    "feature_dropout": lambda x, p, training: (F.dropout2d, (x, p, training), {}),
    "convolution": _convolution,
    "copy": lambda x, source, _: (torch.broadcast_to, (source, tuple(x.meta["val"].shape)), {}),
    "alias": lambda x: ("contiguous", (x,), {}),
    "lift_fresh_copy": lambda x: ("clone", (x,), {}),
    "detach_": lambda x: ("detach", (x,), {}),
    "_unsafe_view": lambda x, size: ("view", (x, size), {}),
    "to": _to,
    "_to_copy": _to,
    "clone": lambda x, _: ("clone", (x,), {}),
    "contiguous": lambda x, _: ("contiguous", (x,), {}),
    "unbind": lambda x, dim: (torch.unbind, (x, dim), {}),
    **{f"avg_pool{n}d": _pool(f"avg_pool{n}d") for n in (1, 2, 3)},
    **{f"max_pool{n}d": _pool(f"max_pool{n}d") for n in (1, 2, 3)},
    **{f"{kind}_pad{n}d": _padded(mode) for kind, mode in _PADDINGS.items() for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": _resized("nearest", corners=False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _resized("nearest-exact", corners=False) for n in (1, 2, 3)},
    **{f"upsample_{mode}{n}d": _resized(mode, corners=True) for mode, n in _SMOOTH},
    **{f"_upsample_{mode}{n}d_aa": _resized(mode, corners=True, smooth=True) for mode, n in _SMOOTH},
}
