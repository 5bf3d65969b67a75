"""The operators in Triton: for GPUs where the CUDA library was not built, and for the interpreter on CPU tensors.

Functions take reference.py's arguments and mean the same; the algorithms are those of csrc/kernels/cuda. One file per
operator stands in ``_triton``.
"""

from fastlip.ops._triton.apgd_step import apgd_step_
from fastlip.ops._triton.operator_step import operator_step_
from fastlip.ops._triton.pgd_step import pgd_step_, project_
from fastlip.ops._triton.random_start import random_start
from fastlip.ops.reference import judge, pack_weights_  # a few copies: nothing to win here

__all__ = ["apgd_step_", "judge", "operator_step_", "pack_weights_", "pgd_step_", "project_", "random_start"]
