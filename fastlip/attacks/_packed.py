"""Convolutions in float32 on a CPU whose weights are packed once for both passes."""

import math
from functools import cache

import torch
from torch import Tensor, nn

from fastlip import ops
from fastlip.attacks._fused import FusedConv

#: Floats of the widest vector register. An input of fewer channels would fill a small part of one.
_LANES = 16
#: From so many output pixels on, a kernel of several taps loses more by gathering than it saves at the map's edges.
_LARGE = 256
#: Taps and stride along a side that :func:`fastlip.ops.direct_conv_` takes.
_MOST_TAPS = 64
#: Products of sums over taps, for each of Winograd's filtering, from which on that is faster: it transforms the rest.
_WORTH = 1.75
#: Up to so many weights the gradient has a packing of its own: where few weights meet many pixels it is some percent
#: faster, and takes little memory.
_SMALL = 1 << 16


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
        self.channels = (conv.in_channels, conv.out_channels)
        self.kernel, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = (int(conv.padding[0]), int(conv.padding[1]))
        self.bias = conv.bias
        self.plain: FusedConv | None = FusedConv(conv, relu)
        self.few = self.channels[0] < _LANES
        self.direct = self.few and self.dilation == (1, 1) and max(*self.kernel, *self.stride) <= _MOST_TAPS
        self.either_format = self.direct and self.channels[1] <= _LANES
        self.packed = False
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _pack(self, x: Tensor) -> None:
        """Pack the weights where that pays off."""
        plain = self.plain  # another thread may drop it meanwhile
        if self.packed or self.few or plain is None:
            return
        large = math.prod(self.kernel) > 1 and math.prod(self.out_shape(x)[2:]) >= _LARGE
        if large and not self._is_filtered(x):
            return
        weight = plain.conv.weight.detach()
        small = weight.numel() <= _SMALL and not self._is_filtered(x)
        adjoint = ops.packed_taps(weight.flatten(2).permute(2, 0, 1)) if small else None
        self.register_buffer("adjoint_weight", adjoint)
        self.register_buffer("weight", ops.packed_taps(weight.flatten(2).permute(2, 1, 0)))
        self.packed = True
        self.plain = None

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """The shape of conv(x), [B, C', H', W']."""
        return len(x), self.channels[1], self._outputs(x.shape[2], 0), self._outputs(x.shape[3], 1)

    def product(
        self,
        x: Tensor,  # [B, C, H, W]
        other: Tensor | None,  # [B, C', H', W']
        relu: bool,
        convs: ops.IndirectConvs,
        record: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """conv(x), plus ``other``, and its positive part with ``relu``, once ``convs`` are run; like :class:`Layer`."""
        self._pack(x)
        if (plain := self.plain) is not None:
            if self.either_format and self._is_direct(plain, x):
                # Most likely the next layer has an input of few channels too, or else pixels for rows of a matrix.
                memory_format = torch.contiguous_format if self.channels[1] < _LANES else torch.channels_last
                out = torch.empty(self.out_shape(x), dtype=x.dtype, device=x.device, memory_format=memory_format)
                active = torch.empty_like(out, dtype=torch.bool) if relu and record else None
                return self._summed(plain, out, x, other, active, relu, convs), active
            return plain.product(x, other, relu, convs, record)
        x, other = _channels_last(x), None if other is None else _channels_last(other)
        out = torch.empty(self.out_shape(x), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        active = torch.empty_like(out, dtype=torch.bool) if relu and record else None
        if self._is_filtered(x):
            convs.run()
            ops.winograd_conv_(out, x, self.weight, bias=self.bias, other=other, relu=relu, active=active)
        else:
            table = self._meeting(x)[0]
            convs.add(out, x, self.weight, table, bias=self.bias, other=other, relu=relu, active=active)
        return out, active

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
        plain = self.plain
        direct = plain is not None and self._is_direct(plain, like)
        if plain is not None and not direct:
            return plain.gradient(grad, like, other, active, convs)
        # An image's gradient is contiguous, as images are.
        planes = direct and (like.is_contiguous() or self.channels[0] <= 4)
        memory_format = torch.contiguous_format if planes else torch.channels_last
        if other is not None and in_place and other.is_contiguous(memory_format=memory_format):
            out = other
        else:
            out = torch.empty(like.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        if active is not None and active.dtype != torch.bool:
            active = active.bool()
        if plain is not None:
            return self._summed(plain, out, grad, other, active, False, convs, adjoint=True)
        grad = _channels_last(grad)
        other, active = (None if t is None else _channels_last(t) for t in (other, active))
        if self._is_filtered(like):
            convs.run()
            ops.winograd_conv_(out, grad, self.weight, adjoint=True, other=other, active=active)
        else:
            table, own = self._meeting(like)[1], self.adjoint_weight
            weight = self.weight if own is None else own
            convs.add(out, grad, weight, table, adjoint=own is None, other=other, active=active)
        return out

    def _is_direct(self, plain: FusedConv, x: Tensor) -> bool:
        """Whether :func:`fastlip.ops.direct_conv_` computes the gradient with respect to an input like x."""
        return self.direct and plain.matrix(x) is None

    def _summed(
        self,
        plain: FusedConv,
        out: Tensor,
        x: Tensor,
        other: Tensor | None,
        active: Tensor | None,
        relu: bool,
        convs: ops.IndirectConvs,
        adjoint: bool = False,
    ) -> Tensor:
        """``out`` by :func:`fastlip.ops.direct_conv_`."""
        convs.run()
        memory_format = torch.contiguous_format if out.is_contiguous() else torch.channels_last
        other, active = (None if t is None else t.contiguous(memory_format=memory_format) for t in (other, active))
        if not (weight := plain.conv.weight).is_contiguous():
            plain.conv.weight = weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return ops.direct_conv_(
            out, _either(x), weight, stride=self.stride, padding=self.padding, adjoint=adjoint,
            bias=None if adjoint else self.bias, other=other, relu=relu, active=active,
        )  # fmt: skip

    def _is_filtered(self, x: Tensor) -> bool:
        """Whether both passes go by Winograd's filtering; the batch has no say, so that no result depends on it."""
        if self.few or self.kernel != (3, 3) or self.stride != (1, 1) or self.dilation != (1, 1):
            return False
        padding = self.padding[0]
        return padding == self.padding[1] <= 2 and _saves_products(x.shape[2], x.shape[3], padding)

    def _outputs(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    def _meeting(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of the forward pass and of the gradient."""
        size = (x.shape[2], x.shape[3])
        if size not in self._tables:
            rows, columns = (self._sources(size[i], i) for i in (0, 1))
            adjoint_rows, adjoint_columns = (self._adjoint_sources(size[i], i) for i in (0, 1))
            self._tables[size] = (
                ops.meeting_pixels(rows, columns, size[1]),
                ops.meeting_pixels(adjoint_rows, adjoint_columns, self._outputs(size[1], 1)),
            )
        return self._tables[size]

    def _sources(self, size: int, axis: int) -> Tensor:
        """The input row (or column) that each output row meets at each tap, [outputs, taps]; -1 for padding."""
        taps = _count(self.kernel[axis]) * self.dilation[axis] - self.padding[axis]
        return _inside(_count(self._outputs(size, axis))[:, None] * self.stride[axis] + taps, size)

    def _adjoint_sources(self, size: int, axis: int) -> Tensor:
        """The output row that each input row meets at each tap, [rows, taps]; -1 for none."""
        stride = self.stride[axis]
        strides = _count(size)[:, None] + self.padding[axis] - _count(self.kernel[axis]) * self.dilation[axis]
        found = _inside(strides.div(stride, rounding_mode="floor"), self._outputs(size, axis))
        return torch.where(strides % stride == 0, found, -1)


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


def _count(end: int) -> Tensor:
    """0, 1, ..., end - 1, whatever torch's default device is."""
    return torch.arange(end, device="cpu")


def _inside(position: Tensor, size: int) -> Tensor:
    """Positions, and -1 for those outside of [0, size)."""
    return torch.where((position >= 0) & (position < size), position, -1)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _either(x: Tensor) -> Tensor:
    """x, contiguous unless it is channels_last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
