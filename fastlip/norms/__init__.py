"""Operator norms of one operator, and of all layers of a model, with bounds from both sides.

- :func:`conv_norm`: one convolution.
- :func:`layer_norms`: every layer of a model, or of many checkpoints, at one joint confidence.
- :func:`spectral_norm_value` and :func:`constrain_norm`: the norm to differentiate, and to keep below a bound.
- :class:`Operator`, :class:`Composed`, :func:`conv_operator`, :func:`module_operator`, :func:`simplify`,
  :func:`trim` and :func:`operator_norms`: the same for operators put together by hand.
"""

from fastlip.norms._conv_norm import conv_norm
from fastlip.norms._interval import NormInterval
from fastlip.norms._layers import layer_norms
from fastlip.norms._operators.batchnorm import batchnorm_scale, diagonal_norm
from fastlip.norms._operators.composed import Composed
from fastlip.norms._operators.modules import module_operator
from fastlip.norms._operators.operator import Operator, conv_operator
from fastlip.norms._operators.trim import simplify, trim
from fastlip.norms._report.report import NormReport
from fastlip.norms._solve import Settings, memory_for, operator_norms
from fastlip.norms._value import constrain_norm, spectral_norm_value

__all__ = [
    "Composed",
    "NormInterval",
    "NormReport",
    "Operator",
    "Settings",
    "batchnorm_scale",
    "constrain_norm",
    "conv_norm",
    "conv_operator",
    "diagonal_norm",
    "layer_norms",
    "memory_for",
    "module_operator",
    "operator_norms",
    "simplify",
    "spectral_norm_value",
    "trim",
]
