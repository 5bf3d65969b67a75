"""A part of a network without any activation is bounded as a whole by its matrix."""

import copy

import pytest
import torch
from torch import nn

from fastlip.lipschitz import lipschitz_bound, local_lipschitz_bounds


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


class Moved(nn.Module):
    """A linear network that subtracts from its input what it moved."""

    def __init__(self, move):
        super().__init__()
        self.first, self.move, self.last = nn.Conv2d(2, 2, 3, padding=1), move, nn.Linear(32, 5)

    def forward(self, x):
        return self.last(x.flatten(1) - self.move(self.first(x)).reshape(x.size(0), -1))


MOVES = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3),
    "transpose of a view": lambda x: x.view(x.size(0), 2, 16).transpose(-1, -2).contiguous(),
    "movedim": lambda x: x.movedim(1, -1),
    "swapaxes in place": lambda x: x.clone().swapaxes_(2, 3),
    "twice": lambda x: torch.permute(x, (0, 3, 1, 2)).transpose(2, 3),
    "in order": lambda x: x.unsqueeze(1).squeeze(1).flatten(2),
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_values_are_in_the_matrix(move):
    for seed in range(5):
        torch.manual_seed(seed)
        model = Moved(MOVES[move]).double().eval()
        x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(model, x).reshape(5, 32)
        norm = torch.linalg.matrix_norm(jacobian, 2).item()
        bound = lipschitz_bound(model, (2, 4, 4)).upper
        assert bound >= norm * (1.0 - 1e-12)
        assert bound == pytest.approx(norm, rel=1e-6)


class AcrossSamples(nn.Module):
    """The batch's axis is moved behind one of its size and back; without it the output is no batch of one."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv1d(2, 2, 1), nn.Linear(6, 1)
        with torch.no_grad():
            self.last.weight[:, :3] *= 0.01

    def last_of_one(self, x):
        return self.last(torch.relu(self.conv(x[None])).flatten(1))[0]

    def forward(self, x):
        y = torch.relu(self.conv(x).transpose(0, 1))
        return self.last(y.transpose(0, 1).flatten(1)).squeeze()


def test_what_moves_between_samples_is_refused_or_in_no_matrix():
    for seed in range(5):
        torch.manual_seed(seed)
        model = AcrossSamples().eval()
        x = torch.randn(64, 2, 3, dtype=torch.float64)
        rows = torch.func.vmap(torch.func.jacrev(copy.deepcopy(model).double().last_of_one))(x)
        bound = lipschitz_bound(model, (2, 3), check=False).upper
        assert bound >= rows.flatten(1).norm(dim=1).max().item()
        upper = local_lipschitz_bounds(model, x.float(), 0.1, points=1, check=False).upper
        assert (upper >= rows.flatten(1).norm(dim=1) * (1.0 - 1e-6)).all()
        with pytest.raises(ValueError, match="mixes the batch axis into others"):
            lipschitz_bound(model, (2, 3))
