"""Bounds on the rounding errors of what is evaluated in float64 after the iteration."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastlip.norms._operators.composed import AnyOperator, magnitude
from fastlip.norms._operators.masked import Masked
from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.certificate import Array
from fastlip.norms._solvers.iteration_config import Indices

_UNIT = 2.0**-53


class RoundingTerms(NamedTuple):
    """Bounds on the rounding of each operator, [operators]."""

    quotient: Array  # relative error of a quotient of two norms, of vectors in the range and in the domain
    application: Array  # ||fl(A x) - A x|| / ||x||, for A or its adjoint
    magnitude: Array  # upper bound on the norm, which the other terms are multiplied by


def rounding_terms(ops: Sequence[AnyOperator], sizes: Indices) -> RoundingTerms:
    """The terms of operators whose domains have these dimensions, [operators]."""
    dimensions = sizes + np.array([math.prod(op.output_shape) for op in ops])
    return RoundingTerms(
        4.0 * _UNIT * (dimensions + 4),
        np.array([application_error(op) for op in ops]),
        np.array([magnitude(op) for op in ops]),
    )


def application_error(op: AnyOperator) -> float:
    """Bound on ||fl(A x) - A x|| / ||x|| in float64, for A or its adjoint.

    A sum of L products has an error of at most 1.01 L u times the sum of their magnitudes (Higham 2002, section 3.1),
    in any order of summation, and so A x one of L u || |A| ||. In a composition the error of each part is multiplied
    by the norms of the others.
    """
    if isinstance(op, Operator):
        return 1.01 * (reduction_length(op) + 2) * _UNIT * op.absolute_bound
    if isinstance(op, Masked):
        return 1.02 * (reduction_length(op.layer) + 6) * _UNIT * op.magnitude
    product = math.prod(op.norms)
    relative = sum(
        (reduction_length(part) + 2) * part.absolute_bound / norm if norm > 0.0 else 0.0
        for part, norm in zip(op.parts, op.norms, strict=True)
    )
    return 1.02 * _UNIT * (abs(op.scale) * product * relative + 4.0 * op.magnitude)


def reduction_length(op: Operator) -> int:
    """Number of products in the longest sum of A or A^T, borders folded back included."""
    taps = math.prod(op.kernel)
    widest = max(op.weight.shape[0] // op.groups, op.weight.shape[1])
    copies = 1
    if op.padding_mode != "zeros":
        copies = math.prod(1 + max(left, 0) + max(right, 0) for left, right in op.padding)
    return taps * widest * copies
