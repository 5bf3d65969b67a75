"""Small networks as one function with a backward pass of its own, in float32 on a CPU."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlip.attacks._chain import Chain
from fastlip.attacks._fused import FusedConv
from fastlip.attacks._packed import PackedConv
from fastlip.ops import InterleavedLayers, LayerGeometry

#: Channels on one side of each convolution: where both have more, they fill vectors, and Winograd's filtering takes
#: fewer products.
_FEW = 16
#: Weights of a linear layer, which are kept for both passes, and read anew for each block of images.
_MOST_WEIGHTS = 1 << 18
#: Elements of a map of one image: more of them do not stay in cache.
_MOST_ELEMENTS = 1 << 16
#: What the operator takes: taps a side; stride, dilation and padding.
_MOST_TAPS, _MOST_STRIDE = 16, 64


class SmallNetwork(nn.Module):
    """A chain of convolutions and the linear layers behind it, by :class:`fastlip.ops.InterleavedLayers`.

    On maps of a size on which that would not be faster, the chain and the layers run as they are.

    Args:
        chain: each layer a :class:`PackedConv` of the one before it alone.
        linear: what is applied to the elements of its maps, as vectors, and whether a ReLU follows.
    """

    def __init__(self, chain: Chain, linear: Sequence[tuple[nn.Linear, bool]]) -> None:
        super().__init__()
        self.chain = chain
        self.linear = [layer for layer, _ in linear]
        self.relus = [relu for _, relu in linear]
        self.is_flat = len(linear) > 0
        self.layers = nn.ModuleList(self.linear)  # registered
        #: The layers on maps of each size that has come; None where they run as they are.
        self._interleaved: dict[tuple[int, int], InterleavedLayers | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What the last layer gives: [B, C', H', W'], or of a linear one [B, N]."""
        size = (x.shape[2], x.shape[3])
        if size not in self._interleaved:
            self._interleaved[size] = self._interleaved_on(size)
        if (interleaved := self._interleaved[size]) is None:
            return self._as_they_are(x)
        if x.requires_grad and torch.is_grad_enabled():
            out: Tensor = _Interleaved.apply(interleaved, x, self.is_flat)
            return out
        out, _ = interleaved.product(x)
        return out.flatten(1) if self.is_flat else out

    def _as_they_are(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain(x)
        y = y.flatten(1) if self.is_flat else y
        for layer, relu in zip(self.linear, self.relus, strict=True):
            y = layer(y)
            y = y.relu() if relu else y
        return y

    def _interleaved_on(self, size: tuple[int, int]) -> InterleavedLayers | None:
        convs = [(layer.plain, layer.relu) for layer in self.chain.layers if isinstance(layer, PackedConv)]
        layers: list[LayerGeometry] = []
        own: list[nn.Conv2d | nn.Linear] = []
        for fused, relu in convs:
            if fused is None:  # its weights have been packed for maps of another size
                return None
            layers.append(_geometry(fused.conv, size, relu))
            own.append(fused.conv)
            size = layers[-1].output[1:]
        for linear, relu in zip(self.linear, self.relus, strict=True):
            layers.append(LayerGeometry(linear.in_features, linear.out_features, relu=relu))
            own.append(linear)
        if not all(map(_is_small, layers)) or not _fit(layers, len(convs)):
            return None
        return InterleavedLayers(layers, [o.weight for o in own], [o.bias for o in own])


class _Interleaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: InterleavedLayers, x: Tensor, flat: bool) -> Tensor:
        out, active = layers.product(x, record=True)
        ctx.layers = layers
        ctx.save_for_backward(active)
        return out.flatten(1) if flat else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (active,) = ctx.saved_tensors
        return None, ctx.layers.gradient(grad, active), None


def can_be_interleaved(chain: Chain) -> bool:
    """Whether :class:`SmallNetwork` takes a chain: of few channels, each layer a convolution of the one before it."""
    count, plan = len(chain.layers), chain.plan
    straight = plan.inputs == 1 and plan.sources == tuple(range(count)) and plan.outputs == (count,)
    return straight and plan.others == (None,) * count and all(_is_narrow(layer) for layer in chain.layers)


def _is_narrow(layer: nn.Module) -> bool:
    if not isinstance(layer, PackedConv) or not isinstance(layer.plain, FusedConv):
        return False
    conv = layer.plain.conv
    return min(conv.in_channels, conv.out_channels) <= _FEW


def _geometry(conv: nn.Conv2d, size: tuple[int, int], relu: bool) -> LayerGeometry:
    kernel, stride, dilation, padding = (
        (int(given[0]), int(given[1])) for given in (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
    )
    return LayerGeometry(conv.in_channels, conv.out_channels, size, kernel, stride, dilation, padding, relu)


def _is_small(layer: LayerGeometry) -> bool:
    """Whether the operator takes a layer, and is faster for it."""
    if max(layer.kernel) > _MOST_TAPS or max(*layer.stride, *layer.dilation, *layer.padding) > _MOST_STRIDE:
        return False
    if min(layer.output) < 1 or layer.channels * layer.outputs * math.prod(layer.kernel) > _MOST_WEIGHTS:
        return False
    return max(math.prod((layer.channels, *layer.size)), math.prod(layer.output)) <= _MOST_ELEMENTS


def _fit(layers: Sequence[LayerGeometry], convs: int) -> bool:
    """Whether the first linear layer takes as many elements as the last convolution gives; the model says if not."""
    return convs == len(layers) or math.prod(layers[convs - 1].output) == layers[convs].channels
