"""3x3 convolutions on the CPU by minimal filtering: the wrapper of ``winograd_conv_``."""

import torch
from torch import Tensor


def winograd_conv_(
    out: Tensor,  # [B, outputs, H', W'], overwritten
    x: Tensor,  # [B, channels, H, W]
    weight: Tensor,  # [panels, 9 * channels, 16]
    *,
    adjoint: bool = False,
    bias: Tensor | None = None,  # [outputs]
    other: Tensor | None = None,  # [B, outputs, H', W']
    relu: bool = False,
    active: Tensor | None = None,  # [B, outputs, H', W'] bool, overwritten with relu
) -> Tensor:
    """A convolution by a 3x3 kernel at stride 1, padded with zeros, in float32 on the CPU.

    By minimal filtering F(4x4, 3x3) of Winograd (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural
    Networks") at the points 0, +-sqrt(1/2), +-sqrt(2) and infinity: 36 products give 16 pixels, in place of 144.

    The results of a tile of 4x4 pixels round together, about five times as much as sums of products of the largest
    values among the 6x6 pixels that they meet: beside a far larger pixel small ones are lost, and sums that would be 0
    are 0 up to rounding. Values that are not finite, or beyond some 1e36, may spread to all pixels of a tile.

    Maps of 2x2 pixels that stay so have a filtering of their own: their padding takes no products, and of the other 16
    for each channel 9 are left, by Karatsuba's way of multiplying. It rounds as sums of products do where pixels and
    taps of a kernel are alike in size and of either sign, and up to about five times as much where one tap outweighs
    the others. Here, too, the pixels of a map round together.

    ``bias``, ``other``, ``relu`` and ``active`` are as with :class:`IndirectConvs`. An image's result depends neither
    on the other images nor on the number of threads.

    Args:
        out: overwritten, [B, outputs, H + 2 padding - 2, W + 2 padding - 2], channels_last; may be ``other``, and
            shares no memory with the rest.
        x: what is convolved, channels_last.
        weight: from :func:`packed_taps` of the kernel as [9, channels, outputs], row by row.
        adjoint: whether ``weight`` is that of the convolution whose adjoint this is, [panels, 9 * outputs, 16]: the
            kernel is turned by half a turn, and each tap's matrix transposed.
        bias: added to every pixel.
        other: added to the result; channels_last.
        relu: whether a ReLU follows the sums.
        active: where the ReLU passes elements on, or without ``relu`` where the result is kept; likewise.

    Returns:
        out.

    Raises:
        RuntimeError: a tensor is not channels_last or contiguous, float32 (``active`` bool), on the CPU or of the
            shape above.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> kernel = torch.randn(5, 4, 3, 3)  # from 4 channels to 5
        >>> weight = ops.packed_taps(kernel.flatten(2).permute(2, 1, 0))
        >>> x = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
        >>> out = torch.empty(1, 5, 8, 8, memory_format=torch.channels_last)
        >>> out = ops.winograd_conv_(out, x, weight, relu=True)
    """
    none = x.new_empty(0)
    bias, other, active = (none if t is None else t for t in (bias, other, active))
    torch.ops.fastlip.winograd_conv_(out, x, weight, adjoint, bias, other, active, relu)
    return out
