"""Operator norms of one operator, and of all layers of a model, with bounds from both sides.

- :func:`conv_norm`: one convolution.
- :func:`layer_norms`: every layer of a model, or of many checkpoints, at one joint confidence.
- :func:`layer_operator`: registers the linear map of a user's own class of layers.
- :func:`spectral_norm_value`, :func:`constrain_norm`: one layer's norm to differentiate, and to keep below a bound.
- :func:`constrain_norms`, :func:`unconstrain`, :func:`spectral_penalty`: all layers of a model in training.
- :class:`Operator`, :class:`Composed`, :class:`Masked`, :func:`conv_operator`, :func:`module_operator`,
  :func:`simplify`, :func:`trim` and :func:`operator_norms`: the same for operators that are put together by hand.
- :class:`NormOptions`: how all of them compute, as one object in place of keywords.
"""

import warnings
from typing import Any

from fastlip.norms._constrain.one_layer import constrain_norm
from fastlip.norms._constrain.penalty import SpectralPenalty, spectral_penalty
from fastlip.norms._constrain.whole_model import constrain_norms, unconstrain
from fastlip.norms._conv_norm import conv_norm
from fastlip.norms._interval import NormInterval
from fastlip.norms._layer_norms import layer_norms
from fastlip.norms._operator_norms import operator_norms
from fastlip.norms._operators.batchnorm import batchnorm_scale, diagonal_norm
from fastlip.norms._operators.composed import Composed
from fastlip.norms._operators.masked import Masked
from fastlip.norms._operators.modules import module_operator
from fastlip.norms._operators.operator import Operator, conv_operator
from fastlip.norms._operators.registry import layer_operator
from fastlip.norms._operators.trim import simplify, trim
from fastlip.norms._options import NormOptions, memory_for
from fastlip.norms._report.report import NormReport
from fastlip.norms._spectral_norm_value import spectral_norm_value

__all__ = [
    "Composed",
    "Masked",
    "NormInterval",
    "NormOptions",
    "NormReport",
    "Operator",
    "SpectralPenalty",
    "batchnorm_scale",
    "constrain_norm",
    "constrain_norms",
    "conv_norm",
    "conv_operator",
    "diagonal_norm",
    "layer_norms",
    "layer_operator",
    "memory_for",
    "module_operator",
    "operator_norms",
    "simplify",
    "spectral_norm_value",
    "spectral_penalty",
    "trim",
    "unconstrain",
]


def __getattr__(name: str) -> Any:
    if name == "Settings":
        warnings.warn("fastlip.norms.Settings is called NormOptions", DeprecationWarning, stacklevel=2)
        return NormOptions
    raise AttributeError(f"module 'fastlip.norms' has no attribute {name!r}")
