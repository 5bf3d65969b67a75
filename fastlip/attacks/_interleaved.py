"""Small networks as one function with a backward pass of its own, in float32 on a CPU."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlip.attacks._chain import Chain
from fastlip.attacks._packed import PackedConv
from fastlip.ops import InterleavedLayers, LayerGeometry

#: Channels on one side of each convolution: where both have more, they fill vectors. Fewer than that where Winograd's
#: filtering takes a quarter of the products.
FEW = 16
#: Weights of a linear layer, which are kept for both passes, and read anew for each block of images.
_MOST_WEIGHTS = 1 << 18
#: Products of an image in all layers. A few images take the time of eight, which is more than their overhead in large
#: networks.
_MOST_PRODUCTS = 3e6
#: Elements of a map of one image: more of them do not stay in cache.
_MOST_ELEMENTS = 1 << 16
#: What the operator takes: taps a side; stride, dilation and padding.
_MOST_TAPS, _MOST_STRIDE = 16, 64


class SmallNetwork(nn.Module):
    """Chains, pools and linear layers that follow one another, as one function as far as that is faster.

    Args:
        parts: chains of which :func:`can_be_interleaved` is true, modules of which :func:`is_pool` is, and ReLUs; then
            perhaps ``nn.Flatten()``, and behind it linear layers in float32 and ReLUs.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        #: What runs on maps of each size that has come: parts, the first of which may have become one function.
        self.ways: dict[tuple[int, int], list[nn.Module]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What the last part gives: [B, C', H', W'], or of a linear layer [B, N]."""
        size = (x.shape[2], x.shape[3])
        if (way := self.ways.get(size)) is None:
            way = self.ways[size] = self._way_on(x.shape[1], size)
        for part in way:
            x = part(x)
        return x

    def _way_on(self, channels: int, size: tuple[int, int]) -> list[nn.Module]:
        layers: list[LayerGeometry] = []
        own: list[nn.Conv2d | nn.Linear | None] = []
        done, flat, is_flat = 0, False, False
        for place, part in enumerate(self.parts):
            if isinstance(part, nn.Flatten):
                flat = True
                continue
            if isinstance(part, nn.ReLU):
                layers[-1] = layers[-1]._replace(relu=True)
            else:
                found = _described(part, channels, size)
                if found is None or _products(layers) + _products(found[0]) > _MOST_PRODUCTS:
                    break
                layers, own = layers + found[0], own + found[1]
                channels, *rest = layers[-1].output
                size = (rest[0], rest[1])
            done, is_flat = place + 1, flat
        if sum(o is not None for o in own) < 2:  # nothing stays in cache between them
            return list(self.parts)
        weights, biases = ([None if o is None else getattr(o, name) for o in own] for name in ("weight", "bias"))
        ids = [None if o is None else id(o) for o in own]
        return [OneFunction(InterleavedLayers(layers, weights, biases), is_flat, ids), *self.parts[done:]]


class OneFunction(nn.Module):
    """Layers by :class:`fastlip.ops.InterleavedLayers`.

    Args:
        interleaved: the layers.
        is_flat: whether the output is [B, N], and not [B, C', H', W'].
        own: the ids of the modules with their weights, None of pools.
    """

    def __init__(self, interleaved: InterleavedLayers, is_flat: bool, own: Sequence[int | None] = ()) -> None:
        super().__init__()
        self.interleaved, self.is_flat, self.own = interleaved, is_flat, own

    def forward(self, x: Tensor) -> Tensor:
        """What the last layer gives."""
        if x.requires_grad and torch.is_grad_enabled():
            out: Tensor = _Interleaved.apply(self.interleaved, x, self.is_flat)
            return out
        return self.interleaved.product(x, flat=self.is_flat)[0]


class _Interleaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: InterleavedLayers, x: Tensor, flat: bool) -> Tensor:
        out, active = layers.product(x, record=True, flat=flat)  # no view, as something may be written into it
        ctx.layers = layers
        ctx.save_for_backward(active)
        return out

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
    if not isinstance(layer, PackedConv) or layer.plain is None:
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


#: Layers, each with the module that has its weight; None of pools.
_Described = tuple[list[LayerGeometry], list[nn.Conv2d | nn.Linear | None]]


def _described(part: nn.Module, channels: int, size: tuple[int, int]) -> _Described | None:
    """The layers of a part on such maps, or None if the operator takes one of them not at all or no faster."""
    layers: list[LayerGeometry] = []
    own: list[nn.Conv2d | nn.Linear | None] = []
    for layer in part.layers if isinstance(part, Chain) else [part]:
        if isinstance(layer, PackedConv):
            plain = layer.plain  # another thread may drop it meanwhile
            if plain is None:  # packed on maps of another size
                return None
            if layer.is_filtered(size) and min(layer.geometry.channels) >= FEW:
                return None
            own.append(plain.conv)
            layers.append(_convolution(plain.conv, size, layer.relu))
        elif isinstance(layer, nn.Linear):
            if layer.in_features != channels * math.prod(size):
                return None  # PyTorch says so
            own.append(layer)
            layers.append(LayerGeometry(layer.in_features, layer.out_features))
        else:
            pools = _pools(layer, channels, size)
            own += [None] * len(pools)
            layers += pools
        if not layers or not all(map(_is_small, layers)):
            return None
        channels, *rest = layers[-1].output
        size = (rest[0], rest[1])
    return layers, own


def _products(layers: Sequence[LayerGeometry]) -> int:
    """Of an image."""
    return sum(
        layer.channels * math.prod(layer.kernel) * math.prod(layer.output) for layer in layers if layer.kind == "conv"
    )


def _convolution(conv: nn.Conv2d, size: tuple[int, int], relu: bool) -> LayerGeometry:
    kernel, stride, dilation, padding = map(_pair, (conv.kernel_size, conv.stride, conv.dilation, conv.padding))
    return LayerGeometry(conv.in_channels, conv.out_channels, size, kernel, stride, dilation, padding, relu)


def _pools(module: nn.Module, channels: int, size: tuple[int, int]) -> list[LayerGeometry]:
    """A pool, as means of means where it is over a large map; none where that cannot be."""
    if isinstance(module, nn.MaxPool2d):
        kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
        dilation = _pair(module.dilation)
        return [LayerGeometry(channels, channels, size, kernel, stride, dilation, padding, kind="max_pool")]
    if isinstance(module, nn.AvgPool2d):
        kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
        return [LayerGeometry(channels, channels, size, kernel, stride, padding=padding, kind="average_pool")]
    found: list[LayerGeometry] = []
    while size != (1, 1):
        kernel = _largest_factor(size[0]), _largest_factor(size[1])
        if kernel == (1, 1):
            return []
        found.append(LayerGeometry(channels, channels, size, kernel, kernel, kind="average_pool"))
        size = size[0] // kernel[0], size[1] // kernel[1]
    return found or [LayerGeometry(channels, channels, kind="average_pool")]


def _largest_factor(number: int) -> int:
    """The largest one that the operator takes as a side of a kernel."""
    return next(factor for factor in range(min(number, _MOST_TAPS), 0, -1) if number % factor == 0)


def _pair(number: Any) -> tuple[int, int]:
    """One number for both sides, or one for each."""
    numbers = tuple(number) if isinstance(number, Sequence) else (number,)
    return int(numbers[0]), int(numbers[-1])


def _is_small(layer: LayerGeometry) -> bool:
    """Whether the operator takes a layer, and is faster for it."""
    if max(layer.kernel) > _MOST_TAPS or max(*layer.stride, *layer.dilation, *layer.padding) > _MOST_STRIDE:
        return False
    taps = math.prod(layer.kernel)
    if layer.kind == "conv":
        fits = layer.channels * layer.outputs * taps <= _MOST_WEIGHTS
    else:  # a window without an element is an error of PyTorch's
        fits = (taps < 256 or layer.kind != "max_pool") and all(
            2 * p <= k for p, k in zip(layer.padding, layer.kernel, strict=True)
        )
    if not fits or min(layer.output) < 1:
        return False
    return max(math.prod((layer.channels, *layer.size)), math.prod(layer.output)) <= _MOST_ELEMENTS
