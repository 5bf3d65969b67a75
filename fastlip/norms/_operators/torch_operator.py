"""One operator by torch's own convolutions."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlip.norms._operators.operator import Operator


class TorchOperator:
    """One operator by torch's convolutions, which have a gradient in the weight and define what the operator means.

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
        # Positions at the far end that no strided window reaches belong to the domain, and get 0.
        rest = tuple(
            n + 2 * p - e - (m - 1) * s
            for n, p, e, m, s in zip(self._padded_size, self._pad, g.extent, g.output_size, g.stride, strict=True)
        )
        x = torch.convolution(y, self.weight, None, g.stride, self._pad, g.dilation, True, rest, g.groups)
        return x if self._native else self._fold(x)

    def outer(self, y: Tensor, x: Tensor) -> Tensor:
        """The gradient of <y, A x> in the weight, [Cout, Cin / groups, *kernel]; x and y as above, with b = 1."""
        g = self.geometry
        if not self._axes:
            rows, columns = (t.view(g.groups, -1) for t in (y[0], x[0]))
            return (rows[:, :, None] * columns[:, None]).flatten(0, 1)
        if not self._native:
            x = self._extend(x)
        zeros, only = (0,) * self._axes, (False, True, False)
        gradient: Tensor = torch.ops.aten.convolution_backward(
            y, x, self.weight, None, g.stride, self._pad, g.dilation, False, zeros, g.groups, only
        )[1]
        return gradient

    def _extend(self, x: Tensor) -> Tensor:
        """The padding map."""
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
        """Per axis, the input position that each position of the padded input copies."""
        g = self.geometry
        indices = []
        for n, (left, right) in zip(g.input_size, g.padding, strict=True):
            if g.padding_mode == "circular":  # around the whole input, whereas F.pad goes around what a crop leaves
                copied = torch.arange(-left, n + right) % n
            else:
                copied = F.pad(torch.arange(n, dtype=torch.float64)[None], (left, right), mode=g.padding_mode)[0].long()
            indices.append(copied.to(self.weight.device))
        return indices
