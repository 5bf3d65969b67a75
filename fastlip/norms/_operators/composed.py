"""Convolutions applied one after the other, with a multiple of the identity beside them."""

import math
from dataclasses import dataclass

from fastlip.norms._operators.operator import Operator, reduction_length

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
    def magnitude(self) -> float:
        """An upper bound on the norm."""
        return abs(self.identity) + abs(self.scale) * math.prod(self.norms)

    @property
    def forward_error(self) -> float:
        """Bound on ||fl(A x) - A x|| / ||x|| in float64: each part's own, carried on by the norms of the others."""
        product = math.prod(self.norms)
        relative = sum(
            (reduction_length(part) + 2) * part.absolute_bound / norm if norm > 0.0 else 0.0
            for part, norm in zip(self.parts, self.norms, strict=True)
        )
        return 1.02 * _UNIT * (abs(self.scale) * product * relative + 4.0 * self.magnitude)


AnyOperator = Operator | Composed


def forward_error(op: AnyOperator) -> float:
    """Bound on ||fl(A x) - A x|| / ||x|| in float64, for A or its adjoint.

    A sum of L products is off by at most 1.01 L u times the sum of their magnitudes (Higham 2002, section 3.1), in any
    order of summation, whence L u || |A| ||.
    """
    if isinstance(op, Composed):
        return op.forward_error
    return 1.01 * (reduction_length(op) + 2) * _UNIT * op.absolute_bound


def magnitude(op: AnyOperator) -> float:
    """An upper bound on the norm that costs nothing, for rounding terms."""
    return op.magnitude if isinstance(op, Composed) else op.absolute_bound


def weight_numel(op: AnyOperator) -> int:
    """Number of weights."""
    return sum(part.weight.numel() for part in op.parts) if isinstance(op, Composed) else op.weight.numel()
