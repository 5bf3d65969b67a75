"""Gradients of convolutions with respect to images on the CPU: the wrapper of ``conv_input_grad_``."""

from collections.abc import Sequence

import torch
from torch import Tensor


def conv_input_grad_(
    out: Tensor,  # [B, C, H, W], overwritten
    grad: Tensor,  # [B, H', W', outputs]
    weight: Tensor,  # [outputs, C, h, w]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """The gradient of a convolution with respect to an input of few channels, in float32 on the CPU.

    What ``torch.nn.grad.conv2d_input`` computes, for one group without dilation. It is made for images, whose channels
    fill a small part of a SIMD register: registers hold the outputs at the taps of a row, and are summed in the end.

    An image's result depends neither on the other images nor on the number of threads. A weight that is not finite may
    make NaN of pixels at the sides that do not meet it. Not differentiable.

    Args:
        out: overwritten, contiguous or channels_last; must not share memory with the others.
        grad: the gradient with respect to what the convolution returns, channels last.
        weight: the convolution's.
        stride: the convolution's, of rows and columns or one for both.
        padding: the convolution's, by zeros; likewise.

    Returns:
        out.

    Raises:
        RuntimeError: a tensor is not float32, on the CPU, contiguous or of the shape above; ``grad`` has not the size
            that the convolution of ``out`` has; or the kernel has more than 64 taps along one side.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> weight = torch.randn(16, 3, 5, 5)
        >>> grad = torch.randn(8, 14, 14, 16)  # channels last
        >>> out = ops.conv_input_grad_(torch.empty(8, 3, 28, 28), grad, weight, stride=2, padding=2)
    """
    pairs = ([given] * 2 if isinstance(given, int) else list(given) for given in (stride, padding))
    torch.ops.fastlip.conv_input_grad_(out, grad, weight, *pairs)
    return out
