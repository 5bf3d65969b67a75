"""FASTLIP_MATMUL_PRECISION, and certificates that are as good with either precision.

The precisions differ in the CUDA library only, on whose source test_cuda_source.py runs these tests.
"""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastlip import conv_norm
from fastlip.norms import NormInterval
from fastlip.norms._solvers import batched_operator
from fastlip.ops import MATMUL_PRECISIONS

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def weight(device: str) -> Tensor:
    return torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)


def norm(device: str, dtype: torch.dtype = torch.float32) -> NormInterval:
    generator = torch.Generator().manual_seed(0)
    return conv_norm(weight(device), (8, 8), padding=1, method="lanczos", rtol=1e-3, dtype=dtype, generator=generator)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", MATMUL_PRECISIONS)
def test_certificates_are_as_good(precision, device, monkeypatch):
    monkeypatch.delenv("FASTLIP_MATMUL_PRECISION", raising=False)
    exact, usual = norm("cpu", torch.float64), norm(device)
    monkeypatch.setenv("FASTLIP_MATMUL_PRECISION", precision)
    found = norm(device)
    assert found.converged
    assert found.lower <= exact.upper
    assert found.upper >= exact.lower
    assert found.upper / found.lower - 1 <= 1.5 * (usual.upper / usual.lower - 1)


@pytest.mark.parametrize(("value", "precision"), [(None, "float32"), ("", "float32"), ("3xtf32", "3xtf32")])
def test_the_variable_reaches_the_operator(value, precision, monkeypatch):
    monkeypatch.delenv("FASTLIP_MATMUL_PRECISION", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTLIP_MATMUL_PRECISION", value)
    with patch.object(batched_operator, "operator_step_", wraps=batched_operator.operator_step_) as step:
        norm("cpu")
    assert {call.kwargs["matmul_precision"] for call in step.call_args_list} == {precision}


def test_the_former_variable_warns(monkeypatch):
    monkeypatch.delenv("FASTLIP_MATMUL_PRECISION", raising=False)
    monkeypatch.setenv("FASTLIP_PRODUCTS", "3xtf32")
    with pytest.warns(DeprecationWarning, match="FASTLIP_PRODUCTS is now FASTLIP_MATMUL_PRECISION"):
        assert batched_operator.matmul_precision() == "3xtf32"
    monkeypatch.setenv("FASTLIP_MATMUL_PRECISION", "float32")
    assert batched_operator.matmul_precision() == "float32"


def test_an_unknown_value_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTLIP_MATMUL_PRECISION", "tf32")
    with pytest.raises(ValueError, match="FASTLIP_MATMUL_PRECISION=tf32 is unknown; choose one of float32, 3xtf32"):
        norm("cpu")
