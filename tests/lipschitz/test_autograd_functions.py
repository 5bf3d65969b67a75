"""Bounds of modules around a function with a backward of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlip


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError


class New(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class Swish(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [Old, New])
def test_their_forward_is_traced(function: type[torch.autograd.Function]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    found = fastlip.lipschitz_bound(nn.Sequential(layer, Swish(function)), (5,))
    assert found.upper == pytest.approx(fastlip.lipschitz_bound(nn.Sequential(layer, nn.SiLU()), (5,)).upper, rel=1e-6)
    assert function.apply(torch.ones(1)).item() == pytest.approx(torch.sigmoid(torch.ones(1)).item())
