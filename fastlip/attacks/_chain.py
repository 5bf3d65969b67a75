"""Fused layers that follow each other, as one function with a backward pass of its own."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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

    def product(self, x: Tensor, other: Tensor | None, relu: bool, convs: IndirectConvs) -> Tensor:
        """conv(x), plus ``other`` of the same shape, and its positive part with ``relu``; no view."""

    def gradient(
        self, grad: Tensor, x: Tensor, other: Tensor | None, mask: Tensor | None, convs: IndirectConvs
    ) -> Tensor:
        """The gradient of x plus ``other`` where ``mask`` is positive, and 0 elsewhere."""


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
    positive. The sum of the gradients that meet at such a value, and the ReLU's threshold, are part of the product that
    computes the last one of them.
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
    values, _ = _values(layers, plan, inputs, plan.outputs)
    return tuple(values[v] for v in plan.outputs)


def _values(
    layers: Sequence[Layer], plan: Plan, inputs: Sequence[Tensor], kept: Sequence[int]
) -> tuple[dict[int, Tensor], list[torch.Size]]:
    """The values that are ``kept`` (others live for as long as they are read), and the shapes of all."""
    values = dict(enumerate(inputs))
    shapes = [x.shape for x in inputs]
    convs = IndirectConvs(_TOGETHER)
    _, last = _readers(plan)
    for i, layer in enumerate(layers):
        source, other = plan.sources[i], plan.others[i]
        x, summand = values[source], None if other is None else values[other]
        if summand is None or summand.shape == layer.out_shape(x):
            y = layer.product(x, summand, layer.relu, convs)
        else:  # one of them broadcasts
            y = layer.product(x, None, False, convs)
            convs.run()
            y = y + summand
            y = y.relu() if layer.relu else y
        values[plan.inputs + i] = y
        shapes.append(y.shape)
        for v in {source, other} - {None, *kept}:
            if v is not None and last[v] == i:
                del values[v]
    convs.run()
    return values, shapes


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Sequence[Layer], plan: Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = range(plan.inputs, plan.inputs + len(layers))
        ctx.kept = {*plan.sources, *(v for v in results if layers[v - plan.inputs].relu)}
        values, shapes = _values(layers, plan, inputs, (*ctx.kept, *plan.outputs))
        ctx.layers, ctx.plan = layers, plan
        ctx.shapes = shapes
        ctx.save_for_backward(*(values[v] for v in ctx.kept))
        ctx.set_materialize_grads(False)
        return tuple(values[v] for v in plan.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layers, plan = ctx.layers, ctx.plan
        values = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        first, _ = _readers(plan)
        sums = {v: grad for v, grad in zip(plan.outputs, grads, strict=True) if grad is not None}
        convs = IndirectConvs(_TOGETHER)
        done = set()  # values whose sums have been through the ReLU's threshold
        for i in reversed(range(len(layers))):
            value = plan.inputs + i
            if value not in sums:
                continue
            grad = sums.pop(value)
            if layers[i].relu and value not in done:
                convs.run()
                grad = torch.ops.aten.threshold_backward(grad, values[value], 0)
            source, other = plan.sources[i], plan.others[i]
            if other is not None:
                if other in sums or grad.shape != ctx.shapes[other]:
                    convs.run()
                part = grad.sum_to_size(ctx.shapes[other])
                sums[other] = sums[other] + part if other in sums else part
                del part  # which would live through the products below
            x, layer = values[source], source - plan.inputs
            if layer < 0 and not ctx.needs_input_grad[2 + source]:
                continue
            last = layer >= 0 and layers[layer].relu and first[source] == i
            if other is not None and grad.shape != (shape := layers[i].out_shape(x)):  # the convolution broadcast
                convs.run()
                grad = grad.sum_to_size(shape)
            sums[source] = layers[i].gradient(grad, x, sums.get(source), x if last else None, convs)
            if last:
                done.add(source)
        convs.run()
        return (None, None, *(sums.get(v) for v in range(plan.inputs)))
