"""Convolutions in float32 on a CPU whose weights are packed once for both passes."""

import math
from functools import cache

import torch
from torch import Tensor, nn

from fastlip import ops
from fastlip.attacks._fused import FusedConv
from fastlip.attacks._packed_ways import LANES, Direct, Filtered, Gathered, Geometry, Size

#: From so many output pixels on, a kernel of several taps loses more by gathering than it saves at the map's edges.
_LARGE = 256
#: Taps and stride along a side that :func:`fastlip.ops.direct_conv_` takes.
_MOST_TAPS = 64
#: Products of sums over taps, for each of Winograd's filtering, from which on that is faster: it transforms the rest.
_WORTH = 1.75
#: Up to so many weights the gradient has a packing of its own: where few weights meet many pixels it is some percent
#: faster, and takes little memory.
_SMALL = 1 << 16

#: How maps of one size are convolved.
Way = Direct | Filtered | Gathered | FusedConv


def can_be_packed(conv: nn.Conv2d) -> bool:
    """Whether :class:`PackedConv` can take the place of the convolution on this machine."""
    weight = conv.weight
    native = ops.backends["cpu"].name == "native"
    return native and conv.groups == 1 and weight.dtype == torch.float32 and weight.device.type == "cpu"


class PackedConv(nn.Module):
    """A layer of a :class:`Chain`: relu(conv(x) + other), or less of that, by :class:`fastlip.ops.IndirectConvs`.

    Products with padding are left out in both passes; where maps are small, those are most of all products. The weights
    are packed when the first input comes, once for both passes unless they are few, and no longer kept as they were. On
    maps of 4x4 pixels and more 3x3 kernels at stride 1 take a quarter of the products, and on maps of 2x2 pixels that
    stay so 9 in place of 16, by :func:`fastlip.ops.winograd_conv_`.

    There are two exceptions. Large maps have little padding, and PyTorch's convolution does not gather their pixels: it
    serves both passes of other kernels of more than one tap. An input of few channels, as an image is, is convolved by
    PyTorch too, or to few outputs by :func:`fastlip.ops.direct_conv_`, which computes the gradient in any case; unless
    the map is smaller than the kernel.

    Attributes:
        either_format: whether an input may as well be contiguous as channels_last.

    Args:
        conv: a convolution of one group in float32 on the CPU, padded with zeros by numbers of pixels.
        relu: whether a ReLU follows.
    """

    weight: Tensor
    adjoint_weight: Tensor | None

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        padding = (int(conv.padding[0]), int(conv.padding[1]))
        channels = (conv.in_channels, conv.out_channels)
        self.geometry = Geometry(channels, _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation), padding)
        self.bias = conv.bias
        self.plain: FusedConv | None = FusedConv(conv, relu)
        largest = max(*self.geometry.kernel, *self.geometry.stride)
        self.few = channels[0] < LANES
        self.direct = self.few and self.geometry.dilation == (1, 1) and largest <= _MOST_TAPS
        self.either_format = self.direct and channels[1] <= LANES
        #: How maps of each size that has come are convolved.
        self._ways: dict[Size, Way] = {}

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """The shape of conv(x), [B, C', H', W']."""
        return x.shape[0], self.geometry.channels[1], *self.geometry.outputs((x.shape[2], x.shape[3]))

    def product(
        self,
        x: Tensor,  # [B, C, H, W]
        other: Tensor | None,  # [B, C', H', W']
        relu: bool,
        convs: ops.IndirectConvs,
        record: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """conv(x), plus ``other``, and its positive part with ``relu``, once ``convs`` are run; like :class:`Layer`."""
        return self._way(x).product(x, other, relu, convs, record)

    def gradient(
        self,
        grad: Tensor,  # [B, C', H', W']
        like: Tensor,  # [B, C, H, W]
        other: Tensor | None,  # [B, C, H, W]
        active: Tensor | None,  # [B, C, H, W]
        convs: ops.IndirectConvs,
        in_place: bool = False,
    ) -> Tensor:
        """The gradient of x plus ``other`` where ``active`` (0 elsewhere), once ``convs`` are run."""
        return self._way(like).gradient(grad, like, other, active, convs, in_place)

    def _way(self, x: Tensor) -> Way:
        """How maps of x's size are convolved; the batch has no say, so that no result depends on it."""
        size = (x.shape[2], x.shape[3])
        if (way := self._ways.get(size)) is None:
            way = self._ways[size] = self._new_way(x, size)
        return way

    def _new_way(self, x: Tensor, size: Size) -> Way:
        plain, geometry = self.plain, self.geometry  # another thread may drop the former meanwhile
        filtered = self.is_filtered(size)
        if plain is not None:
            if self.few:
                if not self.direct or plain.matrix(x) is not None:
                    return plain
                return Direct(plain.conv.weight, self.bias, geometry, size, None if self.either_format else plain)
            if math.prod(geometry.kernel) > 1 and math.prod(geometry.outputs(size)) >= _LARGE and not filtered:
                return plain
            self._pack(plain, filtered)
        if filtered:
            return Filtered(self.weight, self.bias, geometry, size)
        return Gathered(self.weight, self.adjoint_weight, self.bias, geometry, size)

    def _pack(self, plain: FusedConv, filtered: bool) -> None:
        """Pack the weights, and no longer keep them as they were."""
        weight = plain.conv.weight.detach()
        small = weight.numel() <= _SMALL and not filtered
        adjoint = ops.packed_taps(weight.flatten(2).permute(2, 0, 1)) if small else None
        self.register_buffer("adjoint_weight", adjoint)
        self.register_buffer("weight", ops.packed_taps(weight.flatten(2).permute(2, 1, 0)))
        self._ways.clear()
        self.plain = None

    def is_filtered(self, size: Size) -> bool:
        """Whether both passes go by Winograd's filtering."""
        geometry = self.geometry
        if self.few or geometry.kernel != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
            return False
        padding = geometry.padding[0]
        return padding == geometry.padding[1] <= 2 and _saves_products(*size, padding)


@cache
def _saves_products(height: int, width: int, padding: int) -> bool:
    """Whether Winograd's filtering takes so few of the products of a 3x3 kernel's passes that it is faster."""
    map2 = height == width == 2 and padding == 1  # has a filtering of its own
    sums, filtered = 1, 9 if map2 else 36
    for size in (height, width):
        outputs = size + 2 * padding - 2
        sums *= sum(0 <= i + tap - padding < size for i in range(outputs) for tap in range(3))
        filtered *= -(-max(size, outputs) // 4)
    return sums >= _WORTH * filtered


def _pair(numbers: tuple[int, ...]) -> Size:
    return numbers[0], numbers[1]
