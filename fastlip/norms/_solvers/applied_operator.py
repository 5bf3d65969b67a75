"""One operator on a CPU that is applied to few vectors before its weight changes, so that packing the weight counts."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.batched_operator import BatchedConvolutions, from_rows

#: The least number of output channels, in multiples of output positions, from which unfolded windows are multiplied by
#: the weight as it is: packing that takes longer than the windows.
_CHANNELS = 32


class AppliedOperator(Protocol):
    """An operator for vectors by groups, [groups, n], whose order of elements within a group is its own."""

    def row(self, vector: Tensor) -> Tensor:
        """A vector of the domain, [Cin, *input_size], by groups."""
        ...

    def vectors(self, rows: Tensor) -> Tensor:
        """Vectors of the domain, [b, groups, n], as [b, Cin, *input_size], contiguous."""
        ...

    def image(self, row: Tensor) -> Tensor:
        """A vector of the range as [1, Cout, *output_size], contiguous."""
        ...

    def forward(self, x: Tensor, out: Tensor, scale: float) -> None:
        """Put scale A x into ``out`` for one vector or several, [b, groups, n]; all are contiguous."""
        ...

    def adjoint(self, y: Tensor, scale: float) -> Tensor:
        """Return scale A^T y, a new tensor."""
        ...


def applied_operator(op: Operator) -> AppliedOperator:
    """The operator in the way that takes the least time for a dozen vectors, in the dtype of its weight."""
    if op.groups == 1 and (not op.kernel or unfolds(op)):
        if math.prod(op.kernel) == 1 or _CHANNELS * math.prod(op.output_size) <= len(op.weight):
            return _UnfoldedOperator(op)
    return _PackedOperator(op)


def unfolds(op: Operator) -> bool:
    """Whether torch's ``unfold`` lists the windows of the convolution."""
    return len(op.kernel) == 2 and op.padding_mode == "zeros" and all(a == b >= 0 for a, b in op.padding)


def windows(op: Operator, x: Tensor) -> Tensor:
    """What the weight [Cout, n] is multiplied by for x [Cin, *input_size], [n, positions].

    Args:
        op: a matrix, or a convolution that :func:`unfolds`.
        x: a vector of its domain.
    """
    if _is_pointwise(op):
        return x.reshape(len(x), -1)
    found: Tensor = F.unfold(x[None], op.kernel, op.dilation, _pads(op), op.stride)[0]
    return found


def _is_pointwise(op: Operator) -> bool:
    """Whether each position's output is a product with that position's input; a matrix has one position."""
    return math.prod(op.kernel) == 1 and op.input_size == op.output_size and not any(map(any, op.padding))


def _pads(op: Operator) -> tuple[int, ...]:
    return tuple(before for before, _ in op.padding)


class _UnfoldedOperator:
    """By matrix products with the weight as it is. Vectors are [1, C * pixels]."""

    def __init__(self, op: Operator) -> None:
        self._op = op
        self._weight = op.weight.flatten(1)

    def row(self, vector: Tensor) -> Tensor:
        return vector.reshape(1, -1)

    def vectors(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, *self._op.input_shape)

    def image(self, row: Tensor) -> Tensor:
        return row.view(1, *self._op.output_shape)

    def forward(self, x: Tensor, out: Tensor, scale: float) -> None:
        columns = [windows(self._op, row.view(self._op.input_shape)) for row in x]
        if len(x) == 1:
            torch.mm(self._weight, columns[0], out=out.view(len(self._weight), -1)).mul_(scale)
            return
        images = torch.mm(self._weight, torch.cat(columns, 1)).view(len(self._weight), len(x), -1)
        torch.mul(images.transpose(0, 1), scale, out=out.view(len(x), len(self._weight), -1))

    def adjoint(self, y: Tensor, scale: float) -> Tensor:
        op = self._op
        # So few rows times the weight take less time than the weight's transpose times as many columns.
        columns = torch.mm(y.view(len(self._weight), -1).mT, self._weight).mT
        if not _is_pointwise(op):
            columns = F.fold(columns[None], op.input_size, op.kernel, op.dilation, _pads(op), op.stride)
        return columns.reshape(1, -1).mul_(scale)


class _PackedOperator:
    """By ``operator_step_``. Vectors are [groups, pixels * C / groups]."""

    def __init__(self, op: Operator) -> None:
        self._op = op
        self._packed = BatchedConvolutions([op], 1, op.weight.dtype)

    def row(self, vector: Tensor) -> Tensor:
        rows = vector.flatten(1).mT.reshape(-1) if vector.dim() > 1 else vector
        return self._by_groups(rows, len(vector))

    def vectors(self, rows: Tensor) -> Tensor:
        flat = torch.stack([self._flat(row, self._op.input_shape[0]) for row in rows])
        return from_rows(flat, self._op.input_shape).contiguous()

    def image(self, row: Tensor) -> Tensor:
        return from_rows(self._flat(row, self._op.output_shape[0])[None], self._op.output_shape).contiguous()

    def forward(self, x: Tensor, out: Tensor, scale: float) -> None:
        for row, image in zip(x, out, strict=True):
            if self._op.groups == 1:
                self._packed.forward(row[0], image[0])
                image.mul_(scale)
            else:
                y, _ = self._packed.forward(self._flat(row, self._op.input_shape[0]))
                torch.mul(self._by_groups(y, self._op.output_shape[0]), scale, out=image)

    def adjoint(self, y: Tensor, scale: float) -> Tensor:
        x, _ = self._packed.adjoint(self._flat(y, self._op.output_shape[0]))
        return self._by_groups(x, self._op.input_shape[0]).mul_(scale)

    def _by_groups(self, flat: Tensor, channels: int) -> Tensor:
        """A flat vector [pixels * C] by groups."""
        groups = self._op.groups
        return flat.view(-1, groups, channels // groups).transpose(0, 1).reshape(groups, -1)

    def _flat(self, x: Tensor, channels: int) -> Tensor:
        """A vector by groups as a flat one, [pixels * C]."""
        groups = self._op.groups
        return x.reshape(groups, -1, channels // groups).transpose(0, 1).reshape(-1)
