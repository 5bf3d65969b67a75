"""What every test sees: one thread, the devices at hand, and a small trained network."""

import pytest
import torch
from torch import Tensor, nn

Problem = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    import fastlip

    return str(fastlip.build_info())


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
