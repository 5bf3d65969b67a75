"""Convolutions of few channels on the CPU by direct summation: the wrapper of ``direct_conv_``."""

from collections.abc import Sequence

import torch
from torch import Tensor


def direct_conv_(
    out: Tensor,  # [B, targets, H', W'], overwritten
    x: Tensor,  # [B, sources, H, W]
    weight: Tensor,  # [outputs, channels, h, w]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    adjoint: bool = False,
    bias: Tensor | None = None,  # [targets]
    other: Tensor | None = None,  # [B, targets, H', W']
    relu: bool = False,
    active: Tensor | None = None,  # [B, targets, H', W'] bool, overwritten with relu
) -> Tensor:
    """A convolution with few channels, or its adjoint, in float32 on the CPU.

    What ``torch.nn.functional.conv2d`` computes, or with ``adjoint`` ``torch.nn.grad.conv2d_input``: the gradient with
    respect to the convolution's input. It is made for images and small networks, whose channels fill a small part of
    a SIMD register: registers hold neighbouring pixels of a channel.

    ``bias``, ``other``, ``relu`` and ``active`` are as with :class:`IndirectConvs`. An image's result depends neither
    on the other images nor on the number of threads. A weight that is not finite may make NaN of pixels that meet
    padding. Not differentiable.

    Args:
        out: overwritten, contiguous or channels_last; may be ``other``, and shares no memory with the rest.
        x: what is convolved, or with ``adjoint`` the gradient with respect to the convolution's output; likewise.
        weight: the convolution's, of one group; its outputs are the targets, or with ``adjoint`` the sources.
        stride: the convolution's, of rows and columns or one for both.
        padding: the convolution's, by zeros; likewise.
        adjoint: whether to apply the adjoint.
        bias: added to every pixel.
        other: added to the result, in the memory format of ``out``.
        relu: whether a ReLU follows the sums.
        active: where the ReLU passes elements on, or without ``relu`` where the result is kept; likewise.

    Returns:
        out.

    Raises:
        RuntimeError: a tensor is not float32 (``active`` bool), on the CPU, in one of these memory formats or of the
            shape above; the convolution's output has not the size that it should; or kernel or stride are larger than
            64 along a side.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> weight = torch.randn(16, 3, 5, 5)
        >>> grad = torch.randn(8, 16, 14, 14)
        >>> out = ops.direct_conv_(torch.empty(8, 3, 28, 28), grad, weight, stride=2, padding=2, adjoint=True)
    """
    down, padded = ([given] * 2 if isinstance(given, int) else given for given in (stride, padding))
    none = out.new_empty(0)
    bias, other, active = (none if t is None else t for t in (bias, other, active))
    torch.ops.fastlip.direct_conv_(out, x, weight, bias, other, active, down, padded, adjoint, relu)
    return out
