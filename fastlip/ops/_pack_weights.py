"""The checked wrapper of ``pack_weights_``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlip.ops._operator_plan import packed_size

_DTYPES = (torch.float32, torch.float64)


def pack_weights(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    *,
    adjoint: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolution kernels in the memory layout that :func:`operator_step_` reads, one after the other, flat.

    Packing all of them in one call pays on a GPU, where one launch of the CUDA library packs up to 64.

    Args:
        weights: ``[Cout, Cin / groups, *kernel]`` each, of any floating dtype and on one device.
        groups: number of groups of each convolution.
        adjoint: whether the weights are for the plan of A^T.
        dtype: of the result, torch.float32 or torch.float64.

    Raises:
        ValueError: a shape, a device or the number of ``groups`` is wrong.
        TypeError: a dtype or type is wrong.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> weights = ops.pack_weights([torch.randn(8, 3, 3)], [1])
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if len(weights) != len(groups):
        raise ValueError(f"groups must be as many as weights, got {len(groups)} for {len(weights)}")
    size = 0
    read = []
    for weight, count in zip(weights, groups, strict=True):
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError("weights must be floating-point tensors")
        shape = weight.shape
        if len(shape) < 2 or not weight.numel() or count < 1 or shape[0] % count:
            raise ValueError(
                f"weights must be [Cout, Cin / groups, *kernel] with groups that divide Cout, got {list(shape)} in "
                f"{count} groups"
            )
        if weight.device != weights[0].device:
            raise ValueError(f"weights must be on one device, got {weights[0].device} and {weight.device}")
        size += packed_size(shape, count, adjoint)
        if weight.dtype not in _DTYPES:
            weight = weight.float()
        read.append(weight if weight.is_contiguous() else weight.contiguous())
    out = torch.empty(size, dtype=dtype, device=weights[0].device if weights else None)
    torch.ops.fastlip.pack_weights_(out, [weight.detach() for weight in read], list(groups), adjoint)
    return out
