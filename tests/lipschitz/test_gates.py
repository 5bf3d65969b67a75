"""Gated linear units: constants are the largest of the analytic norms, values lie within their bounds."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval

#: The least and the largest value of a and of b: around 0, beside it, far out, points.
BOXES = [
    *itertools.product([(-1.0, 1.0), (0.5, 3.0), (-40.0, -1.0), (0.0, 0.0), (2.0, 2.0)], [(-1.0, 1.0), (0.5, 3.0)]),
    *itertools.product([(-2.0, 1.0), (1.0, 1.0)], [(-9.0, -4.0), (-50.0, 50.0), (30.0, 40.0), (1.5, 1.5)]),
]


@pytest.mark.parametrize(("a", "b"), BOXES)
def test_the_constant_is_the_largest_norm_on_the_box(a, b):
    lower, upper = (torch.tensor([ends[i] for ends in (a, b)], dtype=torch.float64) for i in (0, 1))
    bound = lipschitz_bound(nn.GLU().double(), (2,), bounds=(lower, upper)).upper
    first, second = (torch.linspace(*ends, 301, dtype=torch.float64) for ends in (a, b))
    gate = torch.sigmoid(second)
    found = torch.hypot(gate, first[:, None] * gate * (1.0 - gate)).max().item()
    assert found <= bound * (1.0 + 1e-12)
    # The two terms are largest at different b, unless that is one point or the gate hardly counts.
    apart = torch.hypot(gate.max(), first.abs().max() * (gate * (1.0 - gate)).max()).item()
    assert bound == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("dim", [-1, -2, 1, 2])
def test_the_axis_and_the_function(dim):
    torch.manual_seed(0)
    x = torch.rand(40, 4, 6, dtype=torch.float64) * 3.0 - 1.5
    for module in (nn.GLU(dim), Applied(lambda t: F.glu(t, dim))):
        bound = lipschitz_bound(module.double(), (4, 6), bounds=(-1.5, 1.5)).upper
        jacobians = torch.stack([torch.autograd.functional.jacobian(module, sample[None]) for sample in x])
        found = torch.linalg.matrix_norm(jacobians.reshape(40, 12, 24), 2).max().item()
        assert found <= bound <= 2.0 * found


def test_the_batch_is_no_axis_to_be_halved():
    with pytest.raises(ValueError, match="batch"):
        lipschitz_bound(nn.GLU(0), (4, 6), bounds=(-1, 1))


def test_there_is_no_constant_everywhere():
    with pytest.raises(ValueError, match="no global Lipschitz constant"):
        lipschitz_bound(nn.GLU(), (6,))


def test_values_lie_within_their_bounds():
    torch.manual_seed(0)
    traced = trace(nn.GLU(1).double(), (6, 2))
    centre, away = 4.0 * torch.randn(2, 50, 6, 2, dtype=torch.float64)
    known = traced.last.interval(Interval(centre - away.abs(), centre + away.abs()))
    for share in (-1.0, 1.0, *torch.rand(20, 50, 6, 2, dtype=torch.float64).mul(2.0).sub(1.0)):
        y = F.glu(centre + share * away.abs(), 1)
        assert (y >= known.lower).all()
        assert (y <= known.upper).all()
        assert (torch.linalg.vector_norm(y.flatten(1), dim=1) <= known.norm).all()


@pytest.mark.parametrize("join", [torch.hstack, torch.dstack, torch.column_stack])
def test_tensors_side_by_side_however_they_are_joined(join):
    torch.manual_seed(0)
    first, second = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    model = Applied(lambda x: join([first(x), second(x).relu()]).flatten(1))
    model.first, model.second = first, second
    x = torch.randn(60, 5, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda t: model(t[None])[0]))(x)
    found = torch.linalg.matrix_norm(jacobians, 2).max().item()
    bound = lipschitz_bound(model.eval(), (5,)).upper
    assert found <= bound * (1.0 + 1e-12)
    assert bound <= math.hypot(*(torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (first, second))) * 1.001


def test_tensors_below_each_other_mix_the_batch():
    with pytest.raises(ValueError, match="depends on the others in its batch"):
        lipschitz_bound(Applied(lambda x: torch.vstack([x, x.relu()]).view(len(x), -1)).eval(), (5,))
