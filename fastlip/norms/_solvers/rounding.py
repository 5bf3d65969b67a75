"""What rounding in float64 may do to the quantities that bounds are computed from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastlip.norms._operators.composed import AnyOperator, forward_error, magnitude
from fastlip.norms._solvers.certificate import Array
from fastlip.norms._solvers.iteration import Indices

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
        np.array([forward_error(op) for op in ops]),
        np.array([magnitude(op) for op in ops]),
    )
