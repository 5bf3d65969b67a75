"""Fused operators, each a function with CPU, CUDA and Triton implementations.

All steps share these semantics, which are checked on every backend against ``fastlip.ops.reference``:

- ``x``, ``grad``, ``x0`` are [B, ...] of one dtype, float32, float64, float16 or bfloat16 (``grad`` of another with a
  :class:`ModelInput`). Arithmetic is float64 for float64 and float32 otherwise; 16-bit results are rounded towards
  ``x0``, so rounding never leaves the ball.
- ``eps`` and ``step_size`` are floats or [B] tensors. Tensors are not inspected (that would synchronise a GPU):
  entries of ``eps`` that are negative or NaN, and of ``step_size`` that are not finite, count as 0.
- ``bounds`` are floats or tensors that broadcast to ``x``; the result always lies within them. ``x0`` should lie within
  them too; where it does not, the box takes precedence over the ball.
- Samples with ``active`` False are not changed.
- Gradient elements that are not finite count as 0. A sample whose ``x`` or ``x0`` holds a NaN is undefined; other
  samples are unaffected.
- Any memory layout is accepted. Nothing is copied where every sample is dense (contiguous or channels_last, with any
  distance between samples) and ``x``, ``grad`` and ``x0`` have the same layout; otherwise the operand that differs is.
- The operators are not differentiable: ``grad`` and ``x0`` are taken as constants, and an ``x`` that requires grad is
  an error where gradients are enabled.
"""

import warnings
from typing import TYPE_CHECKING, Any

from fastlip.ops import _fakes  # noqa: F401  # registers them
from fastlip.ops._apgd_step import APGDState, apgd_schedule, apgd_state, apgd_step_
from fastlip.ops._checks import Bounds, Norm, PerSample
from fastlip.ops._direct_conv import direct_conv_
from fastlip.ops._indirect_conv import IndirectConvs, meeting_pixels, packed_taps
from fastlip.ops._interleaved_layers import InterleavedLayers, LayerGeometry
from fastlip.ops._judge import BestRecord, Judgement, Loss, judge
from fastlip.ops._krylov import krylov_bound, top_eigenpairs
from fastlip.ops._model_input import ModelInput, model_input
from fastlip.ops._norm_gradient import norm_along, scaled_weight_grad
from fastlip.ops._operator_plan import ConvGeometry, OperatorPlan, operator_plan
from fastlip.ops._operator_step import MATMUL_PRECISIONS, MatmulPrecision, operator_step_
from fastlip.ops._pack_weights import pack_weights
from fastlip.ops._pgd_step import pgd_step, pgd_step_, project, project_, random_start
from fastlip.ops._register import Backend, backends
from fastlip.ops._winograd_conv import winograd_conv_

__all__ = [
    "MATMUL_PRECISIONS",
    "APGDState",
    "Backend",
    "BestRecord",
    "Bounds",
    "ConvGeometry",
    "IndirectConvs",
    "InterleavedLayers",
    "Judgement",
    "LayerGeometry",
    "Loss",
    "MatmulPrecision",
    "ModelInput",
    "Norm",
    "OperatorPlan",
    "PerSample",
    "apgd_schedule",
    "apgd_state",
    "apgd_step_",
    "backends",
    "direct_conv_",
    "judge",
    "krylov_bound",
    "meeting_pixels",
    "model_input",
    "norm_along",
    "operator_plan",
    "operator_step_",
    "pack_weights",
    "packed_taps",
    "pgd_step",
    "pgd_step_",
    "project",
    "project_",
    "random_start",
    "scaled_weight_grad",
    "top_eigenpairs",
    "winograd_conv_",
]

#: Former names, each with its present one.
_RENAMED = {"PRODUCTS": "MATMUL_PRECISIONS", "Products": "MatmulPrecision"}

if not TYPE_CHECKING:  # a type checker takes a module with __getattr__ to have every name

    def __getattr__(name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"fastlip.ops.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
