"""Convolutions applied one after the other, with a multiple of the identity beside them."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastlip.norms._operator import Operator, OperatorBatch, absolute_bound, reduction_length

_UNIT = 2.0**-53


@dataclass(frozen=True, eq=False)
class Composed:
    """x to ``identity`` x + ``scale`` A_k ... A_1 x.

    The parts are applied in sequence. A composed kernel would be another operator near the borders.

    Attributes:
        parts: A_1 ... A_k, each fitting the next; of magnitude about 1, since they are not normalised.
        norms: upper bounds on their norms, which only the rounding terms depend on.
        scale: factor of the product.
        identity: factor of the identity; 0 unless the product maps a space to itself.
    """

    parts: tuple[Operator, ...]
    norms: tuple[float, ...]
    scale: float = 1.0
    identity: float = 0.0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first part's input."""
        return self.parts[0].input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the last part's output."""
        return self.parts[-1].output_shape

    @property
    def geometry(self) -> tuple[object, ...]:
        """Equal for operators that can share one batched application."""
        return (self.scale, self.identity, *(part.geometry for part in self.parts))

    @property
    def magnitude(self) -> float:
        """An upper bound on the norm."""
        return abs(self.identity) + abs(self.scale) * math.prod(self.norms)

    @property
    def forward_error(self) -> float:
        """Bound on ||fl(A x) - A x|| / ||x|| in float64: each part's own, carried on by the norms of the others."""
        product = math.prod(self.norms)
        relative = sum(
            (reduction_length(part) + 2) * absolute_bound(part) / norm if norm > 0.0 else 0.0
            for part, norm in zip(self.parts, self.norms, strict=True)
        )
        return 1.02 * _UNIT * (abs(self.scale) * product * relative + 4.0 * self.magnitude)


AnyOperator = Operator | Composed


class Batch(Protocol):
    """P operators of one geometry, applied together to b vectors each; what a fused kernel has to offer."""

    def forward(self, x: Tensor) -> Tensor:
        """A x: [P, b, *input_shape] to [P, b, *output_shape]."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: [P, b, *output_shape] to [P, b, *input_shape]."""
        ...


class _ComposedBatch:
    """The batched application of composed operators."""

    def __init__(self, ops: list[Composed], dtype: torch.dtype) -> None:
        self._scale, self._identity = ops[0].scale, ops[0].identity
        self._batches = [make_batch([op.parts[i] for op in ops], dtype) for i in range(len(ops[0].parts))]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for batch in self._batches:
            y = batch.forward(y)
        return self._scale * y + self._identity * x if self._identity else self._scale * y

    def adjoint(self, y: Tensor) -> Tensor:
        x = y
        for batch in reversed(self._batches):
            x = batch.adjoint(x)
        return self._scale * x + self._identity * y if self._identity else self._scale * x


def make_batch(ops: list[Operator] | list[Composed] | list[AnyOperator], dtype: torch.dtype) -> Batch:
    """The batched application of operators of one geometry, in the arithmetic of ``dtype``."""
    composed = [op for op in ops if isinstance(op, Composed)]
    if composed:
        return _ComposedBatch(composed, dtype)
    plain = [op for op in ops if isinstance(op, Operator)]
    return OperatorBatch(plain[0], torch.stack([op.weight for op in plain]).to(dtype))


def forward_error(op: AnyOperator) -> float:
    """Bound on ||fl(A x) - A x|| / ||x|| in float64, for A or its adjoint.

    A sum of L products is off by at most 1.01 L u times the sum of their magnitudes (Higham 2002, section 3.1), in any
    order of summation, whence L u || |A| ||.
    """
    if isinstance(op, Composed):
        return op.forward_error
    return 1.01 * (reduction_length(op) + 2) * _UNIT * absolute_bound(op)


def magnitude(op: AnyOperator) -> float:
    """An upper bound on the norm that costs nothing, for rounding terms."""
    return op.magnitude if isinstance(op, Composed) else absolute_bound(op)


def device_of(op: AnyOperator) -> torch.device:
    """Where the weights are."""
    return op.parts[0].weight.device if isinstance(op, Composed) else op.weight.device


def weight_numel(op: AnyOperator) -> int:
    """Number of weights."""
    return sum(part.weight.numel() for part in op.parts) if isinstance(op, Composed) else op.weight.numel()
