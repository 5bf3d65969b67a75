"""The linear map that a convolution applies: its weight, its geometry, and the checks of both."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastlip._arguments import integer, is_integer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")

#: Number of elements whose squares are summed in float32, and norms between which no square can leave its range.
_ROW = 1024
_LEAST_NORM, _MOST_NORM = 1e-12, 1e18


@dataclass(frozen=True, eq=False)
class Operator:
    """A convolution on inputs of one size, without its bias; without spatial axes it is a matrix.

    Attributes:
        weight: ``[Cout, Cin / groups, *kernel]``, finite, of any floating dtype.
        input_size: spatial size of the input, one number per axis.
        stride: one number per axis.
        dilation: one number per axis.
        padding: (before, after) per axis; negative numbers crop.
        groups: number of independent channel groups.
        padding_mode: "zeros", "circular", "reflect" or "replicate"; with "circular" the whole input is repeated, also
            where its other side is cropped.

    Example:
        >>> import torch
        >>> import fastlip
        >>> op = fastlip.norms.Operator(torch.randn(5, 7))  # a matrix; conv_operator makes those of convolutions
        >>> print(fastlip.norms.operator_norms([op])[0])
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
        """``[Cin, *input_size]``."""
        return (self.weight.shape[1] * self.groups, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``[Cout, *output_size]``."""
        return (self.weight.shape[0], *self.output_size)

    @cached_property
    def frobenius(self) -> float:
        """An upper bound on the weight's Frobenius norm; 0 only for a zero weight, not finite where it is not."""
        return _frobenius_norms([self.weight])[0]

    @cached_property
    def absolute_bound(self) -> float:
        """An upper bound on ``|| |A| ||``, the norm of the operator with the absolute values of its entries.

        Each tap is a matrix between channels times a map between pixels, whose norm is 1, or more where a padding mode
        repeats pixels. So ``|| |A| ||`` is at most the sum of the taps' Frobenius norms. It scales the rounding terms.
        """
        copies = 1
        if self.padding_mode != "zeros":
            # The interior copies a position at most once, and each border as often as it has positions.
            copies = math.prod(1 + max(left, 0) + max(right, 0) for left, right in self.padding)
        return math.sqrt(math.prod(self.kernel) * copies) * self.frobenius

    def with_weight(self, weight: Tensor) -> "Operator":
        """The same geometry with another weight, of the same shape."""
        new = object.__new__(Operator)  # a fifth of the time that replace takes, and sizes are known
        vars(new).update(vars(self), weight=weight)
        vars(new).pop("frobenius", None)
        vars(new).pop("absolute_bound", None)
        return new


def conv_operator(
    weight: Tensor,
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    finite: bool = True,
) -> Operator:
    """Check the arguments of a convolution, as torch takes them, and describe its linear map.

    With ``finite=False`` the caller must check that the weight is finite, which reads from its device.

    Raises:
        TypeError: ``weight`` is not a dense floating-point tensor, or ``groups`` is no integer.
        ValueError: an argument is wrong; the message names it.

    Example:
        >>> import torch
        >>> import fastlip
        >>> op = fastlip.norms.conv_operator(torch.randn(4, 3, 3, 3), 8, padding=1)
        >>> print(op.input_shape, op.output_shape)
    """
    require_floating(weight)
    axes = weight.dim() - 2
    if not 1 <= axes <= 3:
        raise ValueError(
            f"weight must be [Cout, Cin/groups, *kernel] with 1 to 3 kernel axes, got {list(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got {list(weight.shape)}")
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    groups = integer(groups, "groups")
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels of weight, got {groups}")
    size = per_axis(input_size, "input_size", axes, 1)
    strides = per_axis(stride, "stride", axes, 1)
    dilations = per_axis(dilation, "dilation", axes, 1)
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
    if finite:
        require_finite(op)
    return op


def compute_frobenius(ops: Iterable[Operator]) -> None:
    """Compute ``frobenius`` of all operators that lack it, with one read from each device."""
    missing: dict[torch.device, list[Operator]] = defaultdict(list)
    for op in ops:
        if "frobenius" not in vars(op):
            missing[op.weight.device].append(op)
    for group in missing.values():
        for op, norm in zip(group, _frobenius_norms([op.weight for op in group]), strict=True):
            vars(op)["frobenius"] = norm  # where the cached property keeps it


def inherit_frobenius(new: Operator, old: Operator) -> Operator:
    """``new``, whose weight is a part of ``old``'s, with the bound ``old.frobenius`` where that is known."""
    if "frobenius" in vars(old):
        vars(new)["frobenius"] = old.frobenius
    return new


def require_floating(weight: Tensor) -> None:
    """Raise TypeError for what is no tensor of numbers whose norm can be taken."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a floating-point tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"weight must be a floating-point tensor, one of {names}, got {weight.dtype}")
    if weight.layout != torch.strided or weight.device.type == "meta":
        kind = weight.layout if weight.layout != torch.strided else "one on the meta device, which has no numbers"
        raise TypeError(f"weight must be a dense floating-point tensor, got {kind}")


def require_finite(op: Operator) -> None:
    """Raise ValueError if the weight holds NaN or infinite values."""
    # The norm of a finite weight may overflow.
    if not math.isfinite(op.frobenius) and not torch.isfinite(op.weight).all():
        raise ValueError("weight holds NaN or infinite values; its norm is undefined")


def _frobenius_norms(weights: Sequence[Tensor]) -> list[float]:
    """Upper bounds on the norms of tensors on one device; they are close where squares neither vanish nor overflow."""
    weights = [weight.detach() for weight in weights]
    if weights[0].device.type == "cpu":
        sums = [_row_norm(weight) for weight in weights]
    else:
        sums = list(torch._foreach_norm(weights, 2, dtype=torch.float64))
    found = torch.stack(sums).tolist()
    return [_upper_norm(norm, weight) for norm, weight in zip(found, weights, strict=True)]


def _row_norm(weight: Tensor) -> Tensor:
    """Frobenius norm on a CPU, where float32 is many times faster than float64."""
    wide = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    dense = weight.permute(0, 2, 3, 1) if wide else weight
    if weight.dtype != torch.float32 or weight.numel() < 2 * _ROW or not dense.is_contiguous():
        return torch.linalg.vector_norm(weight, dtype=torch.float64)
    flat = dense.flatten()
    whole = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    return torch.linalg.vector_norm(torch.cat([rows, flat[whole:].double()]))


def _upper_norm(norm: float, weight: Tensor) -> float:
    """An upper bound from ``norm``, the Frobenius norm as it was computed."""
    if not _LEAST_NORM < norm < _MOST_NORM and weight.numel():
        # The squares may have left the range of float64.
        norm = weight.abs().amax().item() * math.sqrt(weight.numel())
    # A row's float32 sum has an error of at most _ROW units, and its root one of half as much.
    return norm * (1.0 + _ROW * torch.finfo(torch.float32).eps)


def per_axis(value: object, name: str, axes: int, least: int) -> tuple[int, ...]:
    """``value`` as one integer per axis, from a single one or from one for each axis.

    Raises:
        ValueError: ``value`` is neither, or one is below ``least``.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if is_integer(value):
        given: Sequence[object] = (value,) * axes
    else:
        given = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()
    sizes = tuple(int(v) for v in given if is_integer(v) and v >= least)
    if len(given) != axes or len(sizes) != axes:
        raise ValueError(f"{name} must be an integer >= {least} or {axes} of them, got {value!r}")
    return sizes


def _padding(
    padding: int | Sequence[int] | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        return tuple((p, p) for p in per_axis(padding, "padding", len(kernel), 0))
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    if max(stride) > 1:
        raise ValueError("padding='same' needs stride 1, as in torch; give the padding as numbers")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def smallest_side(op: Operator) -> int:
    """The smaller side of one group's matrix."""
    return min(math.prod(op.input_shape), math.prod(op.output_shape)) // op.groups


def matrix_entries(op: Operator) -> int:
    """Number of entries of all groups' matrices."""
    return math.prod(op.input_shape) * math.prod(op.output_shape) // op.groups
