"""A convolution together with the sum and the ReLU that follow it, by PyTorch's operators: input gradients on a CPU."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlip.ops import IndirectConvs


class FusedConv(nn.Module):
    """A layer of a :class:`Chain`: relu(conv(x) + other), or less of that, with gradients of these two alone.

    Networks made for large images end in maps of a few pixels, where most of a padded kernel meets zeros. On a map of
    one pixel a 3x3 convolution is the product with its centre tap; on a map of 2x2 pixels the dense matrix from all
    pixels to all pixels has fewer entries than the kernel has products. On such maps, and for kernels of one pixel, the
    convolution is computed as a matrix product on channels_last storage.

    Args:
        conv: the convolution, padded with zeros.
        relu: whether a ReLU follows.
        low: dtype of the output and of the products in the backward pass, for a first layer whose forward pass is
            computed in a wider one.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, low: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu
        self.low = low
        self.back = conv.weight if low is None else nn.Parameter(conv.weight.detach().to(low), requires_grad=False)
        self.pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1 and low is None
        self._dense: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """The shape of conv(x), [B, C', H', W']."""
        c = self.conv
        height, width = (
            (x.shape[2 + i] + 2 * int(c.padding[i]) - c.dilation[i] * (c.kernel_size[i] - 1) - 1) // c.stride[i] + 1
            for i in (0, 1)
        )
        return len(x), c.out_channels, height, width

    def product(
        self,
        x: Tensor,  # [B, C, H, W]
        other: Tensor | None,  # [B, C', H', W']
        relu: bool,
        convs: IndirectConvs,
        record: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """conv(x), plus ``other``, and its positive part with ``relu``, [B, C', H', W']; which is the record, too."""
        convs.run()
        y = self._convolved(x)
        y = y if other is None else y.add_(other)
        y = y.relu_() if relu else y
        return y, y if relu and record else None

    def _convolved(self, x: Tensor) -> Tensor:
        c = self.conv
        dense = self.matrix(x)
        if dense is None and not self.pointwise:
            y = functional.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
            return y if self.low is None else y.to(self.low)
        out = torch.empty(self.out_shape(x), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if dense is not None:
            _affine(_pixels(x).flatten(1), *dense, out=_pixels(out).flatten(1))
        else:
            x = x[:, :, :: c.stride[0], :: c.stride[1]]
            _affine(_pixels(x).flatten(0, 2), c.weight.flatten(1), c.bias, out=_pixels(out).flatten(0, 2))
        return out

    def gradient(
        self,
        grad: Tensor,  # [B, C', H', W']
        like: Tensor,  # [B, C, H, W]
        other: Tensor | None,  # [B, C, H, W]
        active: Tensor | None,  # [B, C, H, W]
        convs: IndirectConvs,
        in_place: bool = False,
    ) -> Tensor:
        """The gradient of x plus ``other`` where ``active`` is positive or True, and 0 elsewhere; [B, C, H, W]."""
        convs.run()
        back = self._gradient(grad, like)
        back = back if other is None else back.add_(other)
        return back if active is None else through_relu(back, active)

    def _gradient(self, grad: Tensor, like: Tensor) -> Tensor:
        c = self.conv
        batch, _, *size = like.shape
        if dense := self.matrix(like):
            return _maps(_pixels(grad).flatten(1) @ dense[0], batch, size, c.in_channels)
        if self.pointwise:
            rows = _pixels(grad).flatten(0, 2) @ c.weight.flatten(1)
            if c.stride == (1, 1):
                return _maps(rows, batch, size, c.in_channels)
            spread = torch.empty(like.shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
            spread.zero_()[:, :, :: c.stride[0], :: c.stride[1]] = _maps(rows, batch, grad.shape[2:], c.in_channels)
            return spread
        unread = torch.empty_like(like, dtype=self.back.dtype, device=grad.device)  # the operator asks for its shape
        back = torch.ops.aten.convolution_backward(
            grad, unread, self.back, None, c.stride, c.padding, c.dilation, False, [0, 0], c.groups,
            [True, False, False],
        )[0]  # fmt: skip
        return back.to(like.dtype)

    def matrix(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The dense matrix [H' W' C', H W C] and bias [H' W' C'], or None if the kernel needs fewer products."""
        size = (x.shape[2], x.shape[3])
        c = self.conv
        if c.groups > 1 or self.low is not None or size[0] * size[1] >= c.kernel_size[0] * c.kernel_size[1]:
            return None
        if size not in self._dense:
            _, _, height, width = self.out_shape(x)
            bias = None if c.bias is None else c.bias.repeat(height * width)
            self._dense[size] = dense_matrix(c, size, (height, width)), bias
        return self._dense[size]


def dense_matrix(conv: nn.Conv2d, size: tuple[int, int], out: tuple[int, int]) -> Tensor:
    """The convolution from a map of ``size`` to one of ``out`` as a matrix, [H' W' C', H W C]."""
    weight = conv.weight
    dense = weight.new_zeros(*out, weight.shape[0], *size, weight.shape[1])
    for row, column in itertools.product(*map(range, out)):
        for i, j in itertools.product(*map(range, conv.kernel_size)):
            y = row * conv.stride[0] - int(conv.padding[0]) + i * conv.dilation[0]
            x = column * conv.stride[1] - int(conv.padding[1]) + j * conv.dilation[1]
            if 0 <= y < size[0] and 0 <= x < size[1]:
                dense[row, column, :, y, x] = weight[:, :, i, j]
    return dense.view(out[0] * out[1] * weight.shape[0], -1)


def through_relu(grad: Tensor, active: Tensor) -> Tensor:
    """``grad`` where ``active``, of the same shape, is positive or True, and 0 elsewhere."""
    if active.dtype == torch.bool:
        active = active.view(torch.int8).to(grad.dtype)  # a fraction of the time that torch.where takes
    return torch.ops.aten.threshold_backward(grad, active, 0)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def _maps(rows: Tensor, batch: int, size: Sequence[int], channels: int) -> Tensor:
    """Rows, each of which is one pixel or one whole map, as [B, C, H, W]."""
    return rows.view(batch, *size, channels).permute(0, 3, 1, 2)


def _affine(rows: Tensor, matrix: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, matrix.t(), out=out)
    else:
        torch.addmm(bias, rows, matrix.t(), out=out)
