"""A part of a network without any activation is bounded as a whole by its matrix."""

import pytest
import torch
from torch import nn

from fastlip.lipschitz import lipschitz_bound


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x - self.layer(x)


def test_a_difference_of_linear_maps_has_the_norm_of_its_matrix():
    torch.manual_seed(0)
    model = Difference().double()
    norm = torch.linalg.matrix_norm(torch.eye(6).double() - model.layer.weight.detach(), 2).item()
    bound = lipschitz_bound(model, (6,)).upper
    assert bound >= norm
    assert bound == pytest.approx(norm, rel=1e-6)
