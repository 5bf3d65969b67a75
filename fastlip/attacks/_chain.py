"""Fused layers that follow each other, as one function with a backward pass of its own."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlip.attacks._fused import through_relu
from fastlip.ops import IndirectConvs

#: Convolutions that are collected before they are run.
_TOGETHER = 16


class Layer(Protocol):
    """relu(conv(x) + other), or less of that, with its gradients.

    A layer may leave the computation to ``convs``: its operands need not be there, nor its result, until they are run.
    """

    relu: bool

    def out_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of conv(x)."""

    def product(
        self, x: Tensor, other: Tensor | None, relu: bool, convs: IndirectConvs, record: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """conv(x), plus ``other`` of the same shape, and its positive part with ``relu``; no view.

        To ``record`` is to return where the ReLU passes elements on, too: a tensor of the same shape which is positive
        or True there, and 0 elsewhere.
        """

    def gradient(
        self,
        grad: Tensor,
        like: Tensor,
        other: Tensor | None,
        active: Tensor | None,
        convs: IndirectConvs,
        in_place: bool = False,
    ) -> Tensor:
        """The gradient of x plus ``other`` where ``active`` is positive or True, and 0 elsewhere.

        ``like`` stands for x, and has its shape, strides and dtype alone. ``in_place``: ``other`` may be overwritten.
        """


class Plan(NamedTuple):
    """What the layers of a chain read and return.

    Values are numbered: the inputs come first, then what each layer returns.

    Attributes:
        inputs: how many inputs there are.
        sources: the value that each layer convolves.
        others: the value that each layer adds, None for none.
        outputs: the values that are read outside of the chain, each once.
    """

    inputs: int
    sources: tuple[int, ...]
    others: tuple[int | None, ...]
    outputs: tuple[int, ...]


@cache
def _readers(plan: Plan) -> tuple[dict[int | None, int], dict[int | None, int]]:
    """The first and the last layer that reads each value."""
    reads = [(v, i) for i, pair in enumerate(zip(plan.sources, plan.others, strict=True)) for v in pair]
    return dict(reversed(reads)), dict(reads)


class Chain(nn.Module):
    """Layers that run one after the other, as one function of its inputs.

    Its backward pass uses what autograd does not know: that the gradient of a ReLU's output matters only where that is
    positive. The sum of the gradients that meet at such a value, and the ReLU's gradient, are part of the product that
    computes the last one of them. Nor do gradients of inputs alone need any value of the forward pass: where each ReLU
    was active is all that is kept of it.
    """

    def __init__(self, layers: Sequence[nn.Module], plan: Plan) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.plan = plan

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The plan's outputs, or its only one."""
        outputs = run(list(self.layers), self.plan, *inputs)
        return outputs[0] if len(outputs) == 1 else outputs


def run(layers: Sequence[Any], plan: Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The plan's outputs, differentiable with respect to the inputs."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        outputs: tuple[Tensor, ...] = _Chained.apply(layers, plan, *inputs)
        return outputs
    outputs, _, _ = _forward(layers, plan, inputs, record=False)
    return outputs


def _forward(
    layers: Sequence[Layer], plan: Plan, inputs: Sequence[Tensor], *, record: bool
) -> tuple[tuple[Tensor, ...], dict[int, Tensor], list[Tensor]]:
    """The plan's outputs; with ``record`` where ReLUs are active, by value, and what has the form of each value."""
    values = dict(enumerate(inputs))
    active: dict[int, Tensor] = {}
    likes = [_like(x) for x in inputs]
    convs = IndirectConvs(_TOGETHER)
    _, last = _readers(plan)
    for i, layer in enumerate(layers):
        source, other = plan.sources[i], plan.others[i]
        x, summand = values[source], None if other is None else values[other]
        if summand is None or summand.shape == layer.out_shape(x):
            y, passes = layer.product(x, summand, layer.relu, convs, record)
        else:  # one of them broadcasts
            y, _ = layer.product(x, None, False, convs)
            convs.run()
            y = y + summand
            y = passes = y.relu() if layer.relu else y
        values[plan.inputs + i] = y
        if record:
            likes.append(_like(y))
            if layer.relu and passes is not None:
                active[plan.inputs + i] = passes
        del x, y, summand, passes  # values live for as long as they are read
        for v in {source, other} - {None, *plan.outputs}:
            if v is not None and last[v] == i:
                del values[v]
    convs.run()
    return tuple(values[v] for v in plan.outputs), active, likes


def _like(x: Tensor) -> Tensor:
    """A tensor with the shape, strides and dtype of x and no memory."""
    return _formed(x.shape, x.stride(), x.dtype)


@lru_cache(maxsize=1024)
def _formed(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Sequence[Layer], plan: Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, active, ctx.likes = _forward(layers, plan, inputs, record=True)
        ctx.layers, ctx.plan = layers, plan
        ctx.with_relu = tuple(active)
        ctx.save_for_backward(*active.values())
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        active = dict(zip(ctx.with_relu, ctx.saved_tensors, strict=True))
        with torch.autocast("cpu", enabled=False):  # whatever the caller of the backward pass is in
            sums = _backward(ctx.layers, ctx.plan, grads, active, ctx.likes, ctx.needs_input_grad[2:])
        return (None, None, *sums)


def _backward(
    layers: Sequence[Layer],
    plan: Plan,
    grads: Sequence[Tensor | None],
    active: dict[int, Tensor],
    likes: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the inputs that are ``wanted`` from those of the outputs and from what :func:`_forward` kept."""
    first, _ = _readers(plan)
    sums = {v: grad for v, grad in zip(plan.outputs, grads, strict=True) if grad is not None}
    convs = IndirectConvs(_TOGETHER)
    done = set()  # values whose sums have been through the ReLU
    own = set()  # values whose sums nothing else reads from their memory, once the convolutions so far are run
    for i in reversed(range(len(layers))):
        value = plan.inputs + i
        if value not in sums:
            continue
        grad = sums.pop(value)
        if layers[i].relu and value not in done:
            convs.run()
            grad = through_relu(grad, active[value])
            own.add(value)
        source, other = plan.sources[i], plan.others[i]
        if other is not None:
            size = likes[other].shape
            if other in sums or grad.shape != size:
                convs.run()
            part = grad.sum_to_size(size)
            if other in sums or part is not grad or value in own:
                own.add(other)
            sums[other] = sums[other] + part if other in sums else part
            del part  # which would live through the products below
        like, layer = likes[source], source - plan.inputs
        if layer < 0 and not wanted[source]:
            continue
        last = layer >= 0 and layers[layer].relu and first[source] == i
        if other is not None and grad.shape != (shape := layers[i].out_shape(like)):  # the convolution broadcast
            convs.run()
            grad = grad.sum_to_size(shape)
        so_far = sums.get(source)
        in_place = source in own and so_far is not grad
        passes = active[source] if last else None
        sums[source] = layers[i].gradient(grad, like, so_far, passes, convs, in_place)
        own.add(source)
        del so_far
        if last:
            done.add(source)
    convs.run()
    return [sums.get(v) for v in range(plan.inputs)]
