"""The linear map a convolution applies: its geometry, and the batched forward and adjoint application."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True, eq=False)
class Operator:
    """A convolution on inputs of one size, without its bias; no spatial axes make it a matrix.

    Attributes:
        weight: [Cout, Cin / groups, *kernel], finite, of any floating dtype.
        input_size: spatial size of the input, one number per axis.
        stride: one number per axis.
        dilation: one number per axis.
        padding: (before, after) per axis; negative numbers crop.
        groups: number of independent channel groups.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
    """

    weight: Tensor
    input_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per axis."""
        return tuple(self.weight.shape[2:])

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """Dilated kernel size per axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return tuple(
            (n + left + right - e) // s + 1
            for n, (left, right), e, s in zip(self.input_size, self.padding, self.extent, self.stride, strict=True)
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[Cin, *input_size]."""
        return (self.weight.shape[1] * self.groups, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[Cout, *output_size]."""
        return (self.weight.shape[0], *self.output_size)

    @cached_property
    def absolute_bound(self) -> float:
        """An upper bound on || |A| ||, the norm of the operator with the absolute values of its entries.

        sqrt(||A||_1 ||A||_inf), with what a padding mode repeats counted. It scales the rounding terms.
        """
        grouped = self.weight.detach().reshape(self.groups, -1, self.weight.shape[1], math.prod(self.kernel))
        sums = (torch.linalg.vector_norm(grouped, 1, dim, dtype=torch.float64).max() for dim in ((2, 3), (1, 3)))
        rows, columns = torch.stack(list(sums)).tolist()  # one read from the device
        copies = 1
        if self.padding_mode != "zeros":
            # One position is copied at most once by the interior, and by each border in full.
            copies = math.prod(1 + max(left, 0) + max(right, 0) for left, right in self.padding)
        return math.sqrt(rows * columns * copies)

    def with_weight(self, weight: Tensor) -> "Operator":
        """The same geometry with another weight."""
        return replace(self, weight=weight)


def conv_operator(
    weight: Tensor,
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Operator:
    """Check the arguments of a convolution, as torch takes them, and describe its linear map.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: an argument is wrong; the message names it.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError("weight must be a floating-point tensor")
    axes = weight.dim() - 2
    if not 1 <= axes <= 3:
        raise ValueError(
            f"weight must be [Cout, Cin/groups, *kernel] with 1 to 3 kernel axes, got {list(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got {list(weight.shape)}")
    check_finite(weight)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels of weight, got {groups}")
    size = _per_axis(input_size, axes, "input_size", 1)
    strides = _per_axis(stride, axes, "stride", 1)
    dilations = _per_axis(dilation, axes, "dilation", 1)
    pads = _padding(padding, tuple(weight.shape[2:]), strides, dilations)
    for n, (left, right) in zip(size, pads, strict=True):
        if padding_mode == "reflect" and max(left, right) >= n:
            raise ValueError(f"padding must be smaller than input_size {n} for padding_mode 'reflect'")
        if padding_mode == "circular" and max(left, right) > n:
            raise ValueError(f"padding must be at most input_size {n} for padding_mode 'circular'")
    op = Operator(weight.detach(), size, strides, dilations, pads, groups, padding_mode)
    if min(op.output_size) < 1:
        raise ValueError(
            f"input_size {list(size)} with this padding is smaller than the kernel's extent {list(op.extent)}"
        )
    return op


def check_finite(weight: Tensor) -> None:
    """Raise ValueError if a weight holds NaN or infinite values; both show in its extremes."""
    if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise ValueError("weight holds NaN or infinite values; its norm is undefined")


def _per_axis(value: int | Sequence[int], axes: int, name: str, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{name} must be an integer >= {least} or {axes} of them, got {value!r}")
    return values


def _padding(
    padding: int | Sequence[int] | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        if max(stride) > 1:
            raise ValueError("padding='same' needs stride 1, as in torch; give the padding as numbers")
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    return tuple((p, p) for p in _per_axis(padding, len(kernel), "padding", 0))


class TorchOperator:
    """One operator by torch's convolutions: where a gradient in the weight is wanted, or a definition.

    Iterations use :func:`fastlip.ops.operator_step_` instead.
    """

    def __init__(self, geometry: Operator, weight: Tensor) -> None:
        """Use ``weight`` [Cout, Cin / groups, *kernel] in place of the geometry's own."""
        self.geometry, self.weight = geometry, weight
        self._axes = len(geometry.kernel)
        pads = geometry.padding
        self._native = geometry.padding_mode == "zeros" and all(left == right >= 0 for left, right in pads)
        self._pad = tuple(left for left, _ in pads) if self._native else (0,) * self._axes
        self._padded_size = (
            geometry.input_size
            if self._native
            else tuple(n + left + right for n, (left, right) in zip(geometry.input_size, pads, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        """A x: [b, Cin, *input_size] to [b, Cout, *output_size]."""
        g = self.geometry
        if not self._axes:
            blocks = self.weight.unflatten(0, (g.groups, -1))
            return torch.einsum("bgi,goi->bgo", x.unflatten(1, (g.groups, -1)), blocks).flatten(1)
        if not self._native:
            x = self._extend(x)
        zeros = (0,) * self._axes
        return torch.convolution(x, self.weight, None, g.stride, self._pad, g.dilation, False, zeros, g.groups)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: [b, Cout, *output_size] to [b, Cin, *input_size]."""
        g = self.geometry
        if not self._axes:
            blocks = self.weight.unflatten(0, (g.groups, -1))
            return torch.einsum("bgo,goi->bgi", y.unflatten(1, (g.groups, -1)), blocks).flatten(1)
        # What the strided windows leave over at the far end gets no contribution, but belongs to the domain.
        rest = tuple(
            n + 2 * p - e - (m - 1) * s
            for n, p, e, m, s in zip(self._padded_size, self._pad, g.extent, g.output_size, g.stride, strict=True)
        )
        x = torch.convolution(y, self.weight, None, g.stride, self._pad, g.dilation, True, rest, g.groups)
        return x if self._native else self._fold(x)

    def _extend(self, x: Tensor) -> Tensor:
        """The padding map P."""
        g = self.geometry
        if g.padding_mode == "zeros":
            return F.pad(x, [p for pair in reversed(g.padding) for p in pair])
        for axis, index in enumerate(self._indices):
            x = x.index_select(axis + 2, index)
        return x

    def _fold(self, x: Tensor) -> Tensor:
        """The adjoint of the padding map."""
        g = self.geometry
        if g.padding_mode == "zeros":
            return F.pad(x, [-p for pair in reversed(g.padding) for p in pair])
        for axis, index in enumerate(self._indices):
            shape = list(x.shape)
            shape[axis + 2] = g.input_size[axis]
            x = x.new_zeros(shape).index_add_(axis + 2, index, x)
        return x

    @cached_property
    def _indices(self) -> list[Tensor]:
        """Per axis, the input position each position of the padded input copies."""
        g = self.geometry
        indices = []
        for n, (left, right) in zip(g.input_size, g.padding, strict=True):
            positions = torch.arange(n, dtype=torch.float64)[None]
            copied = F.pad(positions, (left, right), mode=g.padding_mode)[0]
            indices.append(copied.long().to(self.weight.device))
        return indices


def reduction_length(op: Operator) -> int:
    """Number of products in the longest sum of A or A^T, borders folded back included."""
    taps = math.prod(op.kernel)
    widest = max(op.weight.shape[0] // op.groups, op.weight.shape[1])
    copies = 1
    if op.padding_mode != "zeros":
        copies = math.prod(1 + max(left, 0) + max(right, 0) for left, right in op.padding)
    return taps * widest * copies
