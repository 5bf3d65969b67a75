"""The norm iteration's peer: the same half steps by torch's convolutions (cuDNN on a GPU), a layer at a time."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlip.norms import Operator


class TorchBatchedOperator:
    """A batched operator of fastlip.norms for even zero padding, by conv2d and conv_transpose2d.

    Vectors are [vectors, pixels, channels], which is channels_last: convolutions read and write them as they are. The
    rest of a half step (scaling, subtraction, squared norms) is as few torch operations as possible. Nothing waits for
    the device, so that a CUDA graph can hold it; operators that have ended are not skipped.
    """

    def __init__(self, ops: Sequence[Operator], vectors: int, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, ops[0].weight.device
        self._ops, self._vectors_each = ops, vectors
        self._weights = [
            op.weight.to(dtype).contiguous(memory_format=torch.channels_last)
            if op.kernel
            else op.weight.to(dtype)[:, :, None, None]
            for op in ops
        ]
        self._inputs = [op.input_shape if op.kernel else (*op.input_shape, 1, 1) for op in ops]
        self._outputs = [op.output_shape if op.kernel else (*op.output_shape, 1, 1) for op in ops]
        self._pads = [[p for p, _ in op.padding] or [0, 0] for op in ops]
        self._strides = [list(op.stride) or [1, 1] for op in ops]
        self._rests = [
            [n + 2 * p - e - (m - 1) * s for n, p, e, m, s in zip(i[1:], pad, w.shape[2:], o[1:], stride, strict=True)]
            for i, o, w, pad, stride in zip(
                self._inputs, self._outputs, self._weights, self._pads, self._strides, strict=True
            )
        ]
        self.domain, self.range = self._slices(self._inputs), self._slices(self._outputs)
        self.vectors = [slice(i * vectors, (i + 1) * vectors) for i in range(len(ops))]

    def _slices(self, shapes: Sequence[tuple[int, ...]]) -> list[slice]:
        ends = accumulate((self._vectors_each * prod(shape) for shape in shapes), initial=0)
        return [slice(a, b) for a, b in pairwise(ends)]

    def forward(self, x: Tensor, *args: Tensor | None, **history: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._apply(x, False, *args, **history)

    def adjoint(self, x: Tensor, *args: Tensor | None, **history: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._apply(x, True, *args, **history)

    def _image(self, i: int, vectors: Tensor, adjoint: bool) -> Tensor:
        sources = self._outputs[i] if adjoint else self._inputs[i]
        x = vectors.view(self._vectors_each, *sources[1:], sources[0]).permute(0, 3, 1, 2)
        weight, stride, pad, groups = self._weights[i], self._strides[i], self._pads[i], self._ops[i].groups
        if adjoint:
            return F.conv_transpose2d(x, weight, None, stride, pad, self._rests[i], groups)
        return F.conv2d(x, weight, None, stride, pad, 1, groups)

    def _apply(
        self,
        x: Tensor,
        adjoint: bool,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,
        x_square: Tensor | None = None,
        previous: Tensor | None = None,
        previous_square: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        sources, targets = (self.range, self.domain) if adjoint else (self.domain, self.range)
        out = x.new_empty(targets[-1].stop) if out is None else out
        square = torch.zeros(self.vectors[-1].stop, dtype=torch.float64, device=x.device) if square is None else square
        scale = shift = None
        if x_square is not None:
            length = x_square.sqrt()
            scale = torch.where(length > 0, 1.0 / length, 0.0).to(x.dtype)
            if previous is not None and previous_square is not None:
                other = previous_square.sqrt()
                shift = torch.where(other > 0, length / other, 0.0).to(x.dtype)
        for i, (source, target, own) in enumerate(zip(sources, targets, self.vectors, strict=True)):
            rows = out[target].view(self._vectors_each, -1)
            image = self._image(i, x[source], adjoint).permute(0, 2, 3, 1).reshape(self._vectors_each, -1)
            if scale is None:
                rows.copy_(image)
            elif shift is None or previous is None:
                torch.mul(image, scale[own, None], out=rows)
            else:
                torch.mul(image, scale[own, None], out=rows)
                rows.addcmul_(previous[target].view_as(rows), shift[own, None], value=-1.0)
            square[own] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return out, square
