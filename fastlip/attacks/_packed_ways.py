"""How a convolution in float32 is computed on maps of one size, in both passes, by one of fastlip's CPU operators."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._fused import FusedConv

#: Floats of the widest vector register. An input of fewer channels would fill a small part of one.
LANES = 16

Size = tuple[int, int]
_LAST = torch.channels_last


class Geometry(NamedTuple):
    """A convolution of one group, padded with zeros.

    Attributes:
        channels: of the input and of the output.
        kernel: rows and columns, as those below are.
        stride: likewise.
        dilation: likewise.
        padding: likewise, at each side.
    """

    channels: Size
    kernel: Size
    stride: Size
    dilation: Size
    padding: Size

    def outputs(self, size: Size) -> Size:
        """The size of the output's maps, given that of the input's."""
        return self._outputs(size, 0), self._outputs(size, 1)

    def meeting(self, size: Size) -> tuple[Tensor, Tensor]:
        """The tables of :class:`fastlip.ops.IndirectConvs` for the forward pass and for the gradient."""
        rows, columns = (self._sources(size, axis) for axis in (0, 1))
        adjoint_rows, adjoint_columns = (self._adjoint_sources(size, axis) for axis in (0, 1))
        return (
            ops.meeting_pixels(rows, columns, size[1]),
            ops.meeting_pixels(adjoint_rows, adjoint_columns, self._outputs(size, 1)),
        )

    def _outputs(self, size: Size, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size[axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    def _sources(self, size: Size, axis: int) -> Tensor:
        """The input row (or column) that each output row meets at each tap, [outputs, taps]; -1 for padding."""
        taps = _count(self.kernel[axis]) * self.dilation[axis] - self.padding[axis]
        return _inside(_count(self._outputs(size, axis))[:, None] * self.stride[axis] + taps, size[axis])

    def _adjoint_sources(self, size: Size, axis: int) -> Tensor:
        """The output row that each input row meets at each tap, [rows, taps]; -1 for none."""
        stride = self.stride[axis]
        strides = _count(size[axis])[:, None] + self.padding[axis] - _count(self.kernel[axis]) * self.dilation[axis]
        found = _inside(strides.div(stride, rounding_mode="floor"), self._outputs(size, axis))
        return torch.where(strides % stride == 0, found, -1)


class _ByOperator(ABC):
    """Both passes on maps of one size, channels_last, as :class:`fastlip.attacks._chain.Layer` says.

    Args:
        bias: added to the forward pass.
        geometry: of the convolution.
        size: of the input's maps.
    """

    def __init__(self, bias: Tensor | None, geometry: Geometry, size: Size) -> None:
        self.bias = bias
        self.input = (geometry.channels[0], *size)
        self.output = (geometry.channels[1], *geometry.outputs(size))

    def product(
        self, x: Tensor, other: Tensor | None, relu: bool, convs: ops.IndirectConvs, record: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        out = _new(x, self.output, _LAST)
        active = torch.empty_like(out, dtype=torch.bool) if relu and record else None
        self.convolve(out, x.contiguous(memory_format=_LAST), _formed(other, _LAST), active, relu, convs)
        return out, active

    def gradient(
        self,
        grad: Tensor,
        like: Tensor,
        other: Tensor | None,
        active: Tensor | None,
        convs: ops.IndirectConvs,
        in_place: bool = False,
    ) -> Tensor:
        out = _place(grad, self.input, _LAST, other if in_place else None)
        grad, active = grad.contiguous(memory_format=_LAST), _formed(_flags(active), _LAST)
        self.convolve_back(out, grad, _formed(other, _LAST), active, convs)
        return out

    @abstractmethod
    def convolve(
        self, out: Tensor, x: Tensor, other: Tensor | None, active: Tensor | None, relu: bool, convs: ops.IndirectConvs
    ) -> None:
        """Make ``out`` relu(conv(x) + other), or less of that."""

    @abstractmethod
    def convolve_back(
        self, out: Tensor, grad: Tensor, other: Tensor | None, active: Tensor | None, convs: ops.IndirectConvs
    ) -> None:
        """Make ``out`` the gradient plus ``other`` where ``active``, and 0 elsewhere."""


class Filtered(_ByOperator):
    """By :func:`fastlip.ops.winograd_conv_`, with a weight from :func:`fastlip.ops.packed_taps`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, size: Size) -> None:
        super().__init__(bias, geometry, size)
        self.weight = weight

    def convolve(
        self, out: Tensor, x: Tensor, other: Tensor | None, active: Tensor | None, relu: bool, convs: ops.IndirectConvs
    ) -> None:
        convs.run()
        ops.winograd_conv_(out, x, self.weight, bias=self.bias, other=other, relu=relu, active=active)

    def convolve_back(
        self, out: Tensor, grad: Tensor, other: Tensor | None, active: Tensor | None, convs: ops.IndirectConvs
    ) -> None:
        convs.run()
        ops.winograd_conv_(out, grad, self.weight, adjoint=True, other=other, active=active)


class Gathered(_ByOperator):
    """By :class:`fastlip.ops.IndirectConvs`, with a weight from :func:`fastlip.ops.packed_taps`.

    The gradient may have a weight of its own, packed for the adjoint.
    """

    def __init__(
        self, weight: Tensor, adjoint_weight: Tensor | None, bias: Tensor | None, geometry: Geometry, size: Size
    ) -> None:
        super().__init__(bias, geometry, size)
        self.weight, self.adjoint_weight = weight, adjoint_weight
        self.tables = geometry.meeting(size)

    def convolve(
        self, out: Tensor, x: Tensor, other: Tensor | None, active: Tensor | None, relu: bool, convs: ops.IndirectConvs
    ) -> None:
        convs.add(out, x, self.weight, self.tables[0], bias=self.bias, other=other, relu=relu, active=active)

    def convolve_back(
        self, out: Tensor, grad: Tensor, other: Tensor | None, active: Tensor | None, convs: ops.IndirectConvs
    ) -> None:
        own = self.adjoint_weight
        weight, adjoint = (self.weight, True) if own is None else (own, False)
        convs.add(out, grad, weight, self.tables[1], adjoint=adjoint, other=other, active=active)


class Direct:
    """By :func:`fastlip.ops.direct_conv_`, as :class:`fastlip.attacks._chain.Layer` says.

    Args:
        weight: the convolution's.
        bias: added to the forward pass.
        geometry: of the convolution.
        size: of the input's maps.
        forward: what computes the forward pass, if something else does.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, size: Size, forward: FusedConv | None
    ) -> None:
        # Memory of its own: the model may change its weights, and the copy's may get another layout.
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.bias, self.forward = bias, forward
        self.stride, self.padding = geometry.stride, geometry.padding
        self.input = (geometry.channels[0], *size)
        self.output = (geometry.channels[1], *geometry.outputs(size))
        # Most likely the next layer has an input of few channels too, or else pixels for rows of a matrix.
        self.output_format = torch.contiguous_format if geometry.channels[1] < LANES else _LAST

    def product(
        self, x: Tensor, other: Tensor | None, relu: bool, convs: ops.IndirectConvs, record: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.forward is not None:
            return self.forward.product(x, other, relu, convs, record)
        convs.run()
        out = _new(x, self.output, self.output_format)
        active = torch.empty_like(out, dtype=torch.bool) if relu and record else None
        ops.direct_conv_(
            out, _either(x), self.weight, stride=self.stride, padding=self.padding, bias=self.bias,
            other=_formed(other, self.output_format), relu=relu, active=active,
        )  # fmt: skip
        return out, active

    def gradient(
        self,
        grad: Tensor,
        like: Tensor,
        other: Tensor | None,
        active: Tensor | None,
        convs: ops.IndirectConvs,
        in_place: bool = False,
    ) -> Tensor:
        convs.run()
        # An image's gradient is contiguous, as images are.
        planes = self.input[0] <= 4 or like.is_contiguous()
        memory_format = torch.contiguous_format if planes else _LAST
        out = _place(grad, self.input, memory_format, other if in_place else None)
        return ops.direct_conv_(
            out, _either(grad), self.weight, stride=self.stride, padding=self.padding, adjoint=True,
            other=_formed(other, memory_format), active=_formed(_flags(active), memory_format),
        )  # fmt: skip


def _new(like: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format) -> Tensor:
    """Memory for as many maps of this shape as ``like`` has."""
    return torch.empty((like.shape[0], *shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def _place(like: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format, spare: Tensor | None) -> Tensor:
    """The same, or that of ``spare`` where it has this format."""
    if spare is not None and spare.is_contiguous(memory_format=memory_format):
        return spare
    return _new(like, shape, memory_format)


def _formed(t: Tensor | None, memory_format: torch.memory_format) -> Tensor | None:
    return None if t is None else t.contiguous(memory_format=memory_format)


def _flags(active: Tensor | None) -> Tensor | None:
    """Where ``active`` is positive or True, as bool."""
    return active if active is None or active.dtype == torch.bool else active.bool()


def _either(x: Tensor) -> Tensor:
    """x, contiguous unless it is channels_last."""
    return x if x.is_contiguous(memory_format=_LAST) else x.contiguous()


def _count(end: int) -> Tensor:
    """0, 1, ..., end - 1, whatever torch's default device is."""
    return torch.arange(end, device="cpu")


def _inside(position: Tensor, size: int) -> Tensor:
    """Positions, and -1 for those outside of [0, size)."""
    return torch.where((position >= 0) & (position < size), position, -1)
