import copy

import pytest
from torch import Tensor, nn

Problem = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture
def trained(trained_cnn: Problem) -> Problem:
    """A copy of the small trained network, and images that it classifies correctly."""
    model, inputs, labels = trained_cnn
    return copy.deepcopy(model), inputs.clone(), labels.clone()
