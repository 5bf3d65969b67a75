"""The norm of one convolution."""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor, nn

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.modules import CONVS, TRANSPOSED, module_operator
from fastlip.norms._operators.operator import Operator, conv_operator, per_axis
from fastlip.norms._options import NormKeywords, NormOptions, chosen_options
from fastlip.norms._solvers.solve import solve


def conv_norm(
    weight: Tensor | nn.Module,  # [Cout, Cin / groups, *kernel]
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> NormInterval:
    """Largest singular value of the convolution as a network applies it, from both sides.

    The operator is conv1d, conv2d or conv3d with its stride, padding, dilation, groups and input size, borders
    included; the bias plays no part. Taps that with zero padding never meet the input play none either, and an operator
    without others has the norm 0.

    With the method "auto" small operators are decomposed, with certainty: those that are a matrix of up to 512 rows or
    columns (1024 for ``rtol`` below 0.005; on a GPU 32), which 1x1 kernels, windows that do not overlap and kernels as
    large as the input can be written as. Their intervals are up to a hundredth of ``rtol`` wide, and mostly as wide as
    rounding. Other operators are iterated by Golub-Kahan-Lanczos bidiagonalisation from several random start vectors.
    The lower side is then evaluated on the best Ritz vector. The upper side is a bound that fails with probability at
    most 1 - ``confidence`` over the start vectors, rounding included (van Dorsselaer, Hochstenbach, van der Vorst 2001;
    Dixon 1983 for "power").

    Args:
        weight: kernel, ``[Cout, Cin / groups, *kernel]`` with 1 to 3 kernel axes, floating point; or a convolution of
            torch's, transposed or not, whose settings then count.
        input_size: spatial size of the input, one number or one per axis.
        stride: as in torch.
        padding: as in torch; numbers, "same" or "valid".
        dilation: as in torch.
        groups: as in torch.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        options: how to compute the norm.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Returns:
        The interval. ``converged`` is False where it is wider than ``rtol``; it holds all the same.

    Raises:
        TypeError: ``weight`` is neither a dense floating-point tensor nor a convolution, settings are given beside a
            convolution, or another argument is of the wrong type; the message names it.
        ValueError: an argument is wrong, ``weight`` holds NaN or infinite values, or the method does not apply.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> interval = fastlip.conv_norm(conv, 32)
        >>> print(interval.lower, interval.upper)
        >>> same = fastlip.conv_norm(conv.weight, 32, stride=2, padding=1)
    """
    chosen = chosen_options("conv_norm", options, keywords)
    if isinstance(weight, nn.Module):
        if (stride, padding, dilation, groups, padding_mode) != (1, 0, 1, 1, "zeros"):
            raise TypeError("stride, padding, dilation, groups and padding_mode are those of the module")
        op = _operator_of(weight, input_size)
    else:
        op = conv_operator(
            weight,
            input_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
        )
    return solve([op], chosen.resolved([op.weight]))[0]


def _operator_of(module: nn.Module, input_size: int | Sequence[int]) -> Operator:
    """The map of a convolution on inputs of one spatial size.

    Raises:
        TypeError: ``module`` is no convolution.
        ValueError: ``input_size`` is wrong.
    """
    if not isinstance(module, (*CONVS, *TRANSPOSED)):
        got = type(module).__name__
        raise TypeError(f"weight must be a floating-point tensor or a convolution, got {got}; see layer_norms")
    size = per_axis(input_size, "input_size", len(module.kernel_size), 1)
    return module_operator(module, (module.in_channels, *size))
