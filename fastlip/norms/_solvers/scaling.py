"""Weights of magnitude about 1 for the solvers, and intervals in the scale of the weights that were given."""

import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.operator import Operator

#: Binary orders of magnitude that a weight may be away from 1 and be taken as it is.
_NEAR_ONE = 10


def normalise(op: Operator) -> tuple[Operator, int]:
    """The operator, which is not 0, with a weight of magnitude about 1, and the exponent of the power of 2 removed."""
    weight: Tensor = op.weight.detach()
    # A finite weight's Frobenius norm may overflow.
    _, exponent = math.frexp(min(op.frobenius, sys.float_info.max) / math.sqrt(weight.numel()))
    if abs(exponent) <= _NEAR_ONE and weight.dtype in (torch.float32, torch.float64):
        return op, 0  # copying a network's weights takes as long as their norms
    half = exponent // 2
    # In two factors, each of which is representable for every float64 weight.
    weight = weight.to(torch.float64, copy=True).mul_(2.0**-half).mul_(2.0 ** (half - exponent))
    return replace(op, weight=weight), exponent


def rescale(interval: NormInterval, exponent: int, rtol: float) -> NormInterval:
    """The interval times 2 to the power of ``exponent``, rounded outwards."""
    lower, upper = _ldexp(interval.lower, exponent), _ldexp(interval.upper, exponent)
    # Results outside float64's normal range lose bits, and must not move inwards.
    if math.isinf(lower) or (lower > 0.0 and math.ldexp(lower, -exponent) > interval.lower):
        lower = math.nextafter(lower, 0.0)
    if 0.0 < upper < math.inf and math.ldexp(upper, -exponent) < interval.upper:
        upper = math.nextafter(upper, math.inf)
    if upper == 0.0 < interval.upper:
        upper = math.ulp(0.0)
    rescaled = replace(interval, lower=lower, upper=upper)
    # Where bits were lost the interval has become wider.
    return replace(rescaled, converged=interval.converged and rescaled.width <= max(rtol, interval.width))


def _ldexp(x: float, exponent: int) -> float:
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
