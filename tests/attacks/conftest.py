import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Problem = tuple[nn.Module, Tensor, Tensor]


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


@pytest.fixture(scope="session")
def trained_cnn() -> Problem:
    """A small convolutional network that has learnt ten noisy templates, and images that it classifies correctly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 25, 10),
        )
        templates = torch.rand(10, 3, 12, 12)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            labels = torch.randint(10, (64,))
            inputs = (0.6 * templates[labels] + 0.4 * torch.rand(64, 3, 12, 12)).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    model.eval().zero_grad()
    correct = (model(inputs).argmax(1) == labels).nonzero().squeeze(1)[:32]
    return model, inputs[correct], labels[correct]


@pytest.fixture
def cnn_problem(trained_cnn: Problem) -> Problem:
    """A copy of :func:`trained_cnn` that a test may change."""
    model, inputs, labels = trained_cnn
    return copy.deepcopy(model), inputs.clone(), labels.clone()
