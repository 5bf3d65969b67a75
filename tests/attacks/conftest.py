import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastlip.attacks import _prepare

Problem = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True)
def small_networks_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are tested on networks too small to gain by one."""
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 0.0)


@pytest.fixture
def linear_problem() -> Callable[..., Problem]:
    """A linear model whose gradients do not depend on the batch, and correctly classified inputs near the middle."""

    class Scores(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, None] * self.weight).sum(2)

    def build(batch: int = 8, shape: tuple[int, ...] = (3, 4, 5), classes: int = 4) -> Problem:
        generator = torch.Generator().manual_seed(3)
        model = Scores(torch.randn(classes, torch.Size(shape).numel(), generator=generator))
        inputs = 0.5 + 0.02 * torch.randn(batch, *shape, generator=generator)
        return model, inputs, model(inputs).argmax(1)

    return build


@pytest.fixture
def cnn_problem(trained_cnn: Problem) -> Problem:
    """A copy of :func:`trained_cnn` that a test may change."""
    model, inputs, labels = trained_cnn
    return copy.deepcopy(model), inputs.clone(), labels.clone()
