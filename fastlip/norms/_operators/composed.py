"""Convolutions applied one after the other, with a multiple of the identity beside them."""

import math
from dataclasses import dataclass

from fastlip.norms._operators.masked import Masked
from fastlip.norms._operators.operator import Operator


@dataclass(frozen=True, eq=False)
class Composed:
    """x to ``identity`` x + ``scale`` A_k ... A_1 x.

    The parts are applied in sequence. A composed kernel would be another operator near the borders.

    Attributes:
        parts: A_1 ... A_k, each fitting the next. They are not normalised, so their magnitude should be about 1.
        norms: upper bounds on their norms, which only the rounding terms depend on.
        scale: factor of the product.
        identity: factor of the identity; 0 unless the product maps a space to itself.

    Example:
        >>> import torch
        >>> import fastlip
        >>> first, second = (fastlip.norms.Operator(torch.eye(4) / 2) for _ in range(2))
        >>> both = fastlip.norms.Composed((first, second), norms=(0.5, 0.5), identity=1.0)
        >>> print(fastlip.norms.operator_norms([both])[0])  # of the identity and a fourth of it
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


AnyOperator = Operator | Composed | Masked


def magnitude(op: AnyOperator) -> float:
    """An upper bound on the norm that costs almost nothing to compute; rounding terms are multiplied by it."""
    return op.absolute_bound if isinstance(op, Operator) else op.magnitude


def weight_numel(op: AnyOperator) -> int:
    """Number of weights, of masks alone where a layer is shared."""
    if isinstance(op, Masked):
        return sum(mask.numel() for mask in (op.before, op.after) if mask is not None)
    return sum(part.weight.numel() for part in parts(op))


def parts(op: AnyOperator) -> tuple[Operator, ...]:
    """The operators that it is made of."""
    if isinstance(op, Masked):
        return (op.layer,)
    return op.parts if isinstance(op, Composed) else (op,)
