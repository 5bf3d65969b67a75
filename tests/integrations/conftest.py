import copy

import pytest
from torch import Tensor, nn

from fastlip.attacks import _prepare

Problem = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True)
def small_networks_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are tested on networks too small to gain by one."""
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 0.0)


@pytest.fixture
def trained(trained_cnn: Problem) -> Problem:
    """A copy of the small trained network, and images that it classifies correctly."""
    model, inputs, labels = trained_cnn
    return copy.deepcopy(model), inputs.clone(), labels.clone()
