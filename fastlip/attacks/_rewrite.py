"""Rewriting a traced model so that it is faster in eval mode and differs from the original by rounding alone."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from fastlip.attacks._chain import Chain, Plan
from fastlip.attacks._fused import FusedConv
from fastlip.attacks._interleaved import SmallNetwork, can_be_interleaved, is_pool
from fastlip.attacks._packed import PackedConv, can_be_packed

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ADDS = (operator.add, operator.iadd, torch.add)
POINTWISE = (*_ADDS, operator.sub, torch.sub, operator.mul, torch.mul, operator.truediv, torch.div)
_WRITE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_RELUS = (functional.relu, torch.relu, torch.relu_)
#: Pools as functions, each with the module that does the same, and the names of its arguments behind the input.
_POOLS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.max_pool2d: (
        nn.MaxPool2d,
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
    torch.max_pool2d: (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    functional.avg_pool2d: (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    functional.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
}
#: Where modules have functions that are called with what they do.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Layers that do nothing in eval mode.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def fold(model: fx.GraphModule) -> dict[str, str]:
    """Fold each BatchNorm into the convolution or linear layer before it, unless something else reads that output.

    Returns:
        The names of the BatchNorms by those of the layers.
    """
    folded = {}
    modules = dict(model.named_modules())
    calls = [n.target for n in model.graph.nodes if n.op == "call_module"]
    for node in list(model.graph.nodes):
        norm = modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(norm, _NORMS):
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        linear = modules[str(before.target)]
        if is_hooked(norm) or is_hooked(linear):
            continue
        if calls.count(before.target) > 1 or norm.running_mean is None or norm.running_var is None:
            continue
        if type(linear) not in (*_CONVS, nn.Linear) or (type(linear) is nn.Linear and norm.weight is None):
            continue
        weight, bias = folded_weights(linear, norm)
        linear.weight, linear.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        folded[str(before.target)] = str(node.target)
        node.replace_all_uses_with(before)
        model.graph.erase_node(node)
    return folded


def folded_weights(linear: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a layer with those of the BatchNorm behind it, whose statistics are fixed."""
    fuse = fuse_linear_bn_weights if type(linear) is nn.Linear else fuse_conv_bn_weights
    return fuse(linear.weight, linear.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)


class FullFirst(nn.Module):
    """The first layer. It keeps its precision, because small perturbations of the input vanish in a low one."""

    def __init__(self, layer: nn.Module, precision: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).to(self.precision)


def lower(model: fx.GraphModule, precision: torch.dtype) -> None:
    """Convert everything after the first convolution or linear layer to ``precision``."""
    modules = dict(model.named_modules())
    order = [str(n.target) for n in model.graph.nodes if n.op == "call_module"]
    first = next(i for i, name in enumerate(order) if isinstance(modules[name], (*_CONVS, nn.Linear)))
    for name in set(order[first + 1 :]) - set(order[: first + 1]):
        modules[name].to(precision)
    model.set_submodule(order[first], FullFirst(modules[order[first]], precision))


def fuse(model: fx.GraphModule) -> None:
    """Fuse each convolution with the sum and the ReLU that follow it, and runs of fused convolutions into chains.

    A sum or a ReLU is fused if nothing else reads what comes before it. The fused convolution is a :class:`PackedConv`
    where its weights can be packed, and a :class:`FusedConv` elsewhere.
    """
    modules = dict(model.named_modules())
    calls = [n.target for n in model.graph.nodes if n.op == "call_module"]
    for node in list(model.graph.nodes):
        layer = modules[str(node.target)] if node.op == "call_module" else None
        conv, low = (layer.layer, layer.precision) if isinstance(layer, FullFirst) else (layer, None)
        if is_hooked(layer) or is_hooked(conv):
            continue
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        if calls.count(node.target) > 1 or len(node.args) != 1:
            continue
        chain = [node]
        other = _other_summand(_only_user(node), node)
        if other is not None:
            chain.append(next(iter(node.users)))
        user = _only_user(chain[-1])
        if relu := user is not None and _is_relu(user, modules):
            chain.append(user)
        if any(_changes(between, modules) for between in _between(node, chain[-1]) if between not in chain):
            other, relu, chain = None, False, [node]  # what the convolution or the sum reads may be another by then
        packed = low is None and can_be_packed(conv)
        model.set_submodule(str(node.target), PackedConv(conv, relu) if packed else FusedConv(conv, relu, low))
        with model.graph.inserting_before(chain[-1]):
            fused = model.graph.call_module(str(node.target), tuple(a for a in (node.args[0], other) if a is not None))
        chain[-1].replace_all_uses_with(fused)
        for done in reversed(chain):
            model.graph.erase_node(done)
    _link(model)
    _interleave(model)


def takes_either_format(model: fx.GraphModule) -> bool:
    """Whether all that reads the input may as well have it contiguous as channels_last."""
    modules = dict(model.named_modules())
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    for node in inputs:  # and what is computed of them element by element, as a normalisation is
        for user in node.users:
            if user.op == "call_function" and user.target in POINTWISE:
                inputs.append(user)
                continue
            chain = modules[str(user.target)] if user.op == "call_module" else None
            if isinstance(chain, SmallNetwork):
                continue
            if not isinstance(chain, Chain):
                return False
            value = user.args.index(node)
            readers = [layer for layer, source in zip(chain.layers, chain.plan.sources, strict=True) if source == value]
            if value in chain.plan.others or not all(getattr(layer, "either_format", False) for layer in readers):
                return False
    return True


def _link(model: fx.GraphModule) -> None:
    """Replace each run of fused convolutions that follow one another by a :class:`Chain`."""
    modules = dict(model.named_modules())
    runs: list[list[fx.Node]] = [[]]
    for node in model.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], FusedConv | PackedConv):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    for i, nodes in enumerate(run for run in runs if run):
        _replace(model, nodes, [modules[str(node.target)] for node in nodes], f"chain{i}")


def _replace(model: fx.GraphModule, nodes: list[fx.Node], layers: list[nn.Module], name: str) -> None:
    """Replace ``nodes`` by one chain of ``layers``."""
    reads = [[a for a in node.args if isinstance(a, fx.Node)] for node in nodes]
    inputs = list(dict.fromkeys(a for read in reads for a in read if a not in nodes))
    number = {node: i for i, node in enumerate((*inputs, *nodes))}
    outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
    if outputs:
        plan = Plan(
            len(inputs),
            tuple(number[read[0]] for read in reads),
            tuple(number[read[1]] if len(read) > 1 else None for read in reads),
            tuple(number[node] for node in outputs),
        )
        model.add_submodule(name, Chain(layers, plan))
        with model.graph.inserting_after(nodes[-1]):
            chain = model.graph.call_module(name, tuple(inputs))
        for i, node in enumerate(outputs):
            result = chain
            if len(outputs) > 1:
                with model.graph.inserting_after(chain):
                    result = model.graph.call_function(operator.getitem, (chain, i))
            for user in [user for user in node.users if user not in nodes]:
                user.replace_input_with(node, result)
    for node in reversed(nodes):
        model.graph.erase_node(node)


def _interleave(model: fx.GraphModule) -> None:
    """Replace chains of few channels, with the pools and linear layers behind them, by a :class:`SmallNetwork` each."""
    modules = dict(model.named_modules())
    done: set[fx.Node] = set()
    for node in list(model.graph.nodes):
        if node in done or not isinstance(_part(node, modules), Chain):
            continue
        parts, nodes = _parts_from(node, modules)
        if sum(len(part.layers) if isinstance(part, Chain) else 1 for part in parts) == 1:
            continue  # it has nothing to stay in cache for
        name = f"small_{node.target}"
        model.add_submodule(name, SmallNetwork(parts))
        with model.graph.inserting_before(node):
            small = model.graph.call_module(name, node.args)
        nodes[-1].replace_all_uses_with(small)
        for inner in reversed(nodes):
            for reader in list(inner.users):  # of the size of the batch alone
                reader.replace_input_with(inner, small)
            model.graph.erase_node(inner)
        for reader in [user for user in small.users if _reads_batch(user)]:
            for idle in (*[user for user in reader.users if not user.users], reader):
                if not idle.users:
                    model.graph.erase_node(idle)
        done.update(nodes)


def _parts_from(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[list[nn.Module], list[fx.Node]]:
    """The parts of a :class:`SmallNetwork` from a chain on, each the only one that reads the one before, and nodes."""
    parts: list[nn.Module] = []
    nodes: list[fx.Node] = []
    more: list[nn.Module] = []
    passed: list[fx.Node] = []
    at: fx.Node | None = node
    while at is not None:
        part = _part(at, modules)
        of_vectors = any(isinstance(before, nn.Flatten) for before in (*parts, *more))
        fits = isinstance(part, nn.Linear) == of_vectors or isinstance(part, (nn.ReLU, *_IDLE))
        if part is None or not fits:
            break
        passed.append(at)
        if not isinstance(part, _IDLE):
            more.append(part)
        if not isinstance(part, (nn.Flatten, *_IDLE)):  # which nothing is gained by
            parts, more = parts + more, []
            nodes, passed = nodes + passed, []
        readers = [user for user in at.users if not _reads_batch(user)]
        at = readers[0] if len(readers) == 1 else None
    return parts, nodes


def _part(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """What a node does, if it may be in a :class:`SmallNetwork`."""
    layer = modules[str(node.target)] if node.op == "call_module" else None
    if is_hooked(layer):
        return None
    if isinstance(layer, Chain):
        return layer if can_be_interleaved(layer) else None
    if type(layer) is nn.Linear:
        return layer if layer.weight.dtype == torch.float32 else None
    if isinstance(layer, _IDLE):
        return layer
    if _is_relu(node, modules):
        return nn.ReLU()
    if _flattens(node, modules):
        return nn.Flatten()
    if node.op == "call_function" and node.target in _POOLS:
        kind, names = _POOLS[node.target]
        given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        layer = None if any(isinstance(value, fx.Node) for value in given.values()) else kind(**given)
    return layer if layer is not None and is_pool(layer) else None


def _flattens(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node makes one vector of each image's maps."""
    if node.op == "call_module":
        layer = modules[str(node.target)]
        return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
    if node.target in (torch.flatten, "flatten"):
        return (node.args[1:], node.kwargs) in (((1,), {}), ((1, -1), {}), ((), {"start_dim": 1}))
    if node.op == "call_method" and node.target in ("view", "reshape"):
        size = node.args[1] if len(node.args) == 3 and node.args[2] == -1 else None
        batch = size.args[0] if isinstance(size, fx.Node) and size.target is operator.getitem else size
        return isinstance(batch, fx.Node) and batch.args[:1] == node.args[:1] and _reads_batch(batch)
    return False


def _reads_batch(node: fx.Node) -> bool:
    """Whether all that is read is how many images there are."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.target is getattr and node.args[1:] == ("shape",):
        return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return False


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after ``first`` and before ``last``."""
    node = first.next
    while first is not last and node is not last:
        yield node
        node = node.next


def is_hooked(layer: nn.Module | None) -> bool:
    """Whether functions of its own see or change what a layer does, which nothing may take the place of then."""
    return layer is not None and ("forward" in vars(layer) or any(getattr(layer, hooks) for hooks in HOOKS))


def _changes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node may change a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    written = node.target in _WRITE or getattr(node.target, "__name__", "").endswith("_")
    return written or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(node: fx.Node | None, one: fx.Node) -> fx.Node | None:
    """The summand that ``node`` adds to ``one``; None if it does something else or changes another tensor."""
    if node is None or node.op != "call_function" or node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is one else first
    if first is second or not isinstance(other, fx.Node) or (node.target is operator.iadd and first is not one):
        return None
    return other


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        layer = modules[str(node.target)]
        return type(layer) is nn.ReLU and not is_hooked(layer)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELUS
