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
    """An operator for flat vectors, whose order of elements is its own."""

    def row(self, vector: Tensor) -> Tensor:
        """A vector of the domain, [Cin, *input_size], as a flat one."""
        ...

    def vectors(self, rows: Tensor) -> Tensor:
        """Flat vectors of the domain, [b, n], as [b, Cin, *input_size], contiguous."""
        ...

    def image(self, row: Tensor) -> Tensor:
        """A flat vector of the range, [m], as [1, Cout, *output_size], contiguous."""
        ...

    def forward(self, x: Tensor, out: Tensor, scale: float) -> None:
        """Put scale A x into ``out``."""
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
    """By matrix products with the weight as it is. Flat vectors are [C, pixels]."""

    def __init__(self, op: Operator) -> None:
        self._op = op
        self._weight = op.weight.flatten(1)

    def row(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1)

    def vectors(self, rows: Tensor) -> Tensor:
        return rows.view(-1, *self._op.input_shape)

    def image(self, row: Tensor) -> Tensor:
        return row.view(1, *self._op.output_shape)

    def forward(self, x: Tensor, out: Tensor, scale: float) -> None:
        columns = windows(self._op, x.view(self._op.input_shape))
        torch.mm(self._weight, columns, out=out.view(len(self._weight), -1)).mul_(scale)

    def adjoint(self, y: Tensor, scale: float) -> Tensor:
        op = self._op
        # So few rows times the weight take less time than the weight's transpose times as many columns.
        columns = torch.mm(y.view(len(self._weight), -1).mT, self._weight).mT
        if not _is_pointwise(op):
            columns = F.fold(columns[None], op.input_size, op.kernel, op.dilation, _pads(op), op.stride)
        return columns.reshape(-1).mul_(scale)


class _PackedOperator:
    """By ``operator_step_``. Flat vectors are [pixels, C]."""

    def __init__(self, op: Operator) -> None:
        self._op = op
        self._packed = BatchedConvolutions([op], 1, op.weight.dtype)

    def row(self, vector: Tensor) -> Tensor:
        return vector.flatten(1).mT.reshape(-1) if vector.dim() > 1 else vector

    def vectors(self, rows: Tensor) -> Tensor:
        return from_rows(rows, self._op.input_shape).contiguous()

    def image(self, row: Tensor) -> Tensor:
        return from_rows(row[None], self._op.output_shape).contiguous()

    def forward(self, x: Tensor, out: Tensor, scale: float) -> None:
        self._packed.forward(x, out)
        out.mul_(scale)

    def adjoint(self, y: Tensor, scale: float) -> Tensor:
        return self._packed.adjoint(y)[0].mul_(scale)
