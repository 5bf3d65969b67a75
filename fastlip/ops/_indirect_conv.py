"""Convolutions on the CPU by tables of which pixels meet: the wrapper of ``indirect_conv_``, and its operands."""

import torch
from torch import Tensor
from torch.nn import functional

#: Outputs of a panel of weights, as in csrc/kernels/api.h.
_LANES = 16


def packed_taps(
    weight: Tensor,  # [taps, channels, outputs]
) -> Tensor:
    """The matrices of a convolution's taps in the order in which :func:`indirect_conv_` reads them.

    Returns:
        [ceil(outputs / 16), taps * channels, 16].
    """
    padded = functional.pad(weight.flatten(0, 1), (0, -weight.shape[2] % _LANES))
    return padded.unflatten(1, (-1, _LANES)).transpose(0, 1).contiguous()


def meeting_pixels(
    rows: Tensor,  # [H', h] int64
    columns: Tensor,  # [W', w] int64
    width: int,
) -> Tensor:
    """The table for :func:`indirect_conv_` to maps of H' x W' pixels by kernels of h x w taps.

    Args:
        rows: the source row that each target row meets at each tap of a column of the kernel, -1 for none.
        columns: the same for columns.
        width: of the sources' maps.

    Returns:
        [H' W', 1 + h w] int32: a target pixel and the source pixel that it meets at each tap, -1 for none. Pixels that
        meet the same taps are neighbours.
    """
    down, across = rows[:, None, :, None], columns[None, :, None, :]
    source = torch.where((down < 0) | (across < 0), -1, down * width + across).flatten(2).flatten(0, 1)
    _, kind = torch.unique(source >= 0, dim=0, return_inverse=True)
    order = kind.argsort(stable=True)
    return torch.cat([order[:, None], source[order]], 1).int()


def indirect_conv_(
    out: Tensor,  # [B, targets, outputs], overwritten
    x: Tensor,  # [B, sources, channels]
    weight: Tensor,  # [panels, taps * channels, 16]
    table: Tensor,  # [targets, 1 + taps] int32
    *,
    bias: Tensor | None = None,  # [outputs]
    other: Tensor | None = None,  # [B, targets, outputs]
    mask: Tensor | None = None,  # [B, targets, outputs]
    relu: bool = False,
) -> None:
    """Convolve ``x`` into ``out``, float32 on the CPU, together with the elementwise operations that follow.

    For every row (target, source of tap 0, source of tap 1, ...) of the table, ``out[:, target]`` becomes the sum of
    ``x[:, source] @ weight[tap]`` over the taps whose source is not -1, plus ``bias`` plus ``other[:, target]``. With
    ``relu``, negative elements then become 0. Last, elements become 0 where ``mask`` is not positive: with a ReLU's
    output for a mask, the adjoint of the next layer gives the gradient before that ReLU.

    An image's result depends neither on the other images nor on the number of threads.

    Args:
        out: overwritten; must not share memory with the other tensors.
        x: pixels of the maps, channels last.
        weight: from :func:`packed_taps`.
        table: from :func:`meeting_pixels`, each target once; its entries are not checked.
        bias: added to every pixel.
        other: added to the result.
        mask: the result is kept where it is positive.
        relu: whether a ReLU follows the sums.

    Raises:
        RuntimeError: a tensor is not contiguous, float32 (the table int32), on the CPU or of the shape above.
    """
    torch.ops.fastlip.indirect_conv_(out, x, weight, table, bias, other, mask, relu)
