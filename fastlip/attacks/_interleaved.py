"""Small networks as one function with a backward pass of its own, in float32 on a CPU."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlip.attacks._chain import Chain
from fastlip.attacks._fused import FusedConv
from fastlip.attacks._packed import PackedConv
from fastlip.ops import InterleavedLayers, LayerGeometry

#: Channels on one side of each convolution: where both have more, they fill vectors. Fewer than that where Winograd's
#: filtering takes a quarter of the products.
FEW = 16
#: Weights of a linear layer, which are kept for both passes, and read anew for each block of images.
_MOST_WEIGHTS = 1 << 18
#: Elements of a map of one image: more of them do not stay in cache.
_MOST_ELEMENTS = 1 << 16
#: What the operator takes: taps a side; stride, dilation and padding.
_MOST_TAPS, _MOST_STRIDE = 16, 64


class SmallNetwork(nn.Module):
    """Chains, pools and linear layers that follow one another, by :class:`fastlip.ops.InterleavedLayers`.

    On maps of a size on which that would not be faster, they run as they are.

    Args:
        parts: chains of which :func:`can_be_interleaved` is true, modules of which :func:`is_pool` is, and ReLUs; then
            perhaps ``nn.Flatten()``, and behind it linear layers in float32 and ReLUs.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.is_flat = any(isinstance(part, nn.Flatten) for part in parts)
        #: The layers on maps of each size that has come; None where they run as they are.
        self.interleaved: dict[tuple[int, int], InterleavedLayers | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What the last layer gives: [B, C', H', W'], or of a linear one [B, N]."""
        size = (x.shape[2], x.shape[3])
        if size not in self.interleaved:
            self.interleaved[size] = self._interleaved_on(x.shape[1], size)
        if (interleaved := self.interleaved[size]) is None:
            for part in self.parts:
                x = part(x)
            return x
        return _run(interleaved, x, self.is_flat)

    def with_weights(self) -> list[nn.Conv2d | nn.Linear | None]:
        """The module that has the weight of each layer, None of pools; as long as chains are not packed."""
        own: list[nn.Conv2d | nn.Linear | None] = []
        for part in self._flattened():
            if isinstance(part, PackedConv):
                assert part.plain is not None
                own.append(part.plain.conv)
            elif not isinstance(part, nn.ReLU):
                own.append(part if isinstance(part, nn.Linear) else None)
        return own

    def _interleaved_on(self, channels: int, size: tuple[int, int]) -> InterleavedLayers | None:
        layers: list[LayerGeometry] = []
        for part in self._flattened():
            if isinstance(part, nn.ReLU):
                layers[-1] = layers[-1]._replace(relu=True)
                continue
            if isinstance(part, PackedConv):
                if part.plain is None:  # its weights have been packed for maps of another size
                    return None
                if part.is_filtered(size) and min(part.geometry.channels) >= FEW:
                    return None
                layers.append(_convolution(part.plain.conv, size, part.relu))
            elif isinstance(part, nn.Linear):
                layers.append(LayerGeometry(part.in_features, part.out_features))
                if layers[-1].channels != channels * math.prod(size):
                    return None  # the model says so
            else:
                layers.append(_pool(part, channels, size))
            if not _is_small(layers[-1]):
                return None
            channels, *rest = layers[-1].output
            size = (rest[0], rest[1])
        own = self.with_weights()
        weights, biases = ([None if o is None else getattr(o, name) for o in own] for name in ("weight", "bias"))
        return InterleavedLayers(layers, weights, biases)

    def _flattened(self) -> Iterator[nn.Module]:
        """The layers of all parts."""
        for part in self.parts:
            if isinstance(part, Chain):
                yield from part.layers
            elif not isinstance(part, nn.Flatten):
                yield part


class OneFunction(nn.Module):
    """What a :class:`SmallNetwork` is on maps of one size, alone."""

    def __init__(self, layers: InterleavedLayers, is_flat: bool) -> None:
        super().__init__()
        self.layers, self.is_flat = layers, is_flat

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`SmallNetwork.forward`."""
        return _run(self.layers, x, self.is_flat)


def _run(layers: InterleavedLayers, x: Tensor, flat: bool) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        out: Tensor = _Interleaved.apply(layers, x, flat)
        return out
    out, _ = layers.product(x)
    return out.flatten(1) if flat else out


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
    return min(conv.in_channels, conv.out_channels) <= FEW


def is_pool(module: nn.Module) -> bool:
    """Whether :class:`SmallNetwork` takes a pool."""
    if type(module) is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    if type(module) is nn.AvgPool2d:
        counted = module.count_include_pad or _pair(module.padding) == (0, 0)
        return counted and not module.ceil_mode and module.divisor_override is None
    return type(module) is nn.MaxPool2d and not module.ceil_mode and not module.return_indices


def _convolution(conv: nn.Conv2d, size: tuple[int, int], relu: bool) -> LayerGeometry:
    kernel, stride, dilation, padding = map(_pair, (conv.kernel_size, conv.stride, conv.dilation, conv.padding))
    return LayerGeometry(conv.in_channels, conv.out_channels, size, kernel, stride, dilation, padding, relu)


def _pool(module: nn.Module, channels: int, size: tuple[int, int]) -> LayerGeometry:
    if isinstance(module, nn.MaxPool2d):
        kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
        dilation = _pair(module.dilation)
        return LayerGeometry(channels, channels, size, kernel, stride, dilation, padding, kind="max_pool")
    if isinstance(module, nn.AvgPool2d):
        kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
        return LayerGeometry(channels, channels, size, kernel, stride, padding=padding, kind="average_pool")
    return LayerGeometry(channels, channels, size, size, kind="average_pool")


def _pair(number: Any) -> tuple[int, int]:
    """One number for both sides, or one for each."""
    first, second = number if isinstance(number, Sequence) else (number, number)
    return int(first), int(second)


def _is_small(layer: LayerGeometry) -> bool:
    """Whether the operator takes a layer, and is faster for it."""
    if max(layer.kernel) > _MOST_TAPS or max(*layer.stride, *layer.dilation, *layer.padding) > _MOST_STRIDE:
        return False
    taps = math.prod(layer.kernel)
    if layer.kind == "conv":
        fits = layer.channels * layer.outputs * taps <= _MOST_WEIGHTS
    else:  # a window without an element is an error of PyTorch's
        fits = taps < 256 and all(2 * p <= k for p, k in zip(layer.padding, layer.kernel, strict=True))
    if not fits or min(layer.output) < 1:
        return False
    return max(math.prod((layer.channels, *layer.size)), math.prod(layer.output)) <= _MOST_ELEMENTS
