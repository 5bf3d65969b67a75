"""The norm of one convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.operator import conv_operator
from fastlip.norms._solve import Settings, memory_for, operator_norms


def conv_norm(
    weight: Tensor,  # [Cout, Cin / groups, *kernel]
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    rtol: float = 1e-2,
    confidence: float = 1.0 - 1e-6,
    method: str = "auto",
    generator: torch.Generator | None = None,
    starts: int = 4,
    max_steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
) -> NormInterval:
    """Largest singular value of the convolution as a network applies it, from both sides.

    The operator is conv1d, conv2d or conv3d with its stride, padding, dilation, groups and input size, borders
    included; the bias plays no part. Taps that with zero padding never meet the input play none either, and an operator
    without others has the norm 0. Small operators are decomposed, with certainty: those that are a matrix of up to
    512 rows or columns (1024 for ``rtol`` below 0.005; on a GPU 32), as 1x1 kernels, windows that do not overlap and
    kernels as large as the input may be. With "auto" their intervals are up to a hundredth of ``rtol`` wide, mostly as
    wide as rounding. Otherwise Golub-Kahan-Lanczos iteration runs from several random starts: the lower side is
    evaluated on the best Ritz vector, the upper side is a bound that fails with probability at most 1 - ``confidence``
    over the starts, rounding included (van Dorsselaer, Hochstenbach, van der Vorst 2001; Dixon 1983 for "power").

    Args:
        weight: kernel, [Cout, Cin / groups, *kernel] with 1 to 3 kernel axes, floating point.
        input_size: spatial size of the input, one number or one per axis.
        stride: as in torch.
        padding: as in torch; numbers, "same" or "valid".
        dilation: as in torch.
        groups: as in torch.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        rtol: relative width at which iteration stops, positive and finite.
        confidence: probability that the upper side holds where it depends on random starts.
        method: "auto"; "lanczos" or "power" to iterate in any case; with certainty "svd" (the dense matrix), "cholesky"
            (factorisation of its Gram matrix), "ring" (the circular convolution that this one is part of) or "gram"
            (Gram iteration on that one; Delattre et al. 2023). The last two are upper bounds of another operator, loose
            on small inputs.
        generator: source of the starts; by default one seeded by the operating system.
        starts: independent starts of an iteration; at least 4 are advisable in float32.
        max_steps: most steps of an iteration; 300 for "lanczos", 2000 for "power" if None.
        dtype: arithmetic of "lanczos", torch.float32 or torch.float64; both are certified in float64.
        max_memory: bytes that the iteration's vectors, or the matrix of "svd", may take; if None 2 GiB, on a GPU half
            of what is free there.

    Returns:
        The interval. ``converged`` is False where it is wider than ``rtol``; it holds all the same.

    Raises:
        TypeError: ``weight`` is not a dense floating-point tensor, or another argument is of the wrong type; the
            message names it.
        ValueError: an argument is wrong, ``weight`` holds NaN or infinite values, or the method does not apply.
    """
    memory = memory_for(max_memory, [weight] if isinstance(weight, Tensor) else [])
    settings = Settings(rtol, confidence, method, starts, max_steps, dtype, memory, generator)
    op = conv_operator(
        weight,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
    )
    return operator_norms([op], settings)[0]
