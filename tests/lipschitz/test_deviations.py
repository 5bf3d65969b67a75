"""Standard deviations and variances: constants above every stretch, and values within their bounds."""

import math

import pytest
import torch
from applied import Applied

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval

SHAPE = (3, 4, 5)


CASES = {
    "std": lambda x: x.std((1, 2, 3), keepdim=True),
    "std of one axis": lambda x: torch.std(x, 2, False),
    "std, corrected": lambda x: torch.std(x, dim=(2, 3), correction=2),
    "var": lambda x: torch.var(x, dim=1, unbiased=False, keepdim=True),
    "var of the last axes": lambda x: x.var((-1, -2)),
    "std_mean": lambda x: torch.std_mean(x, (2, 3))[0],
    "var_mean": lambda x: torch.var_mean(x, dim=1, keepdim=True, correction=0)[0],
    "norm of two axes": lambda x: torch.linalg.vector_norm(x, 2, (2, 3), True),
    "mean": lambda x: torch.var_mean(x, dim=1, keepdim=True)[1],
}


def largest_stretch(function):
    generator = torch.Generator().manual_seed(1)
    best = 0.0
    for index in range(30):
        point = torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64)
        point = point.round() if index % 2 else point
        jacobian = torch.autograd.functional.jacobian(function, point).reshape(-1, math.prod(SHAPE))
        best = max(best, torch.linalg.matrix_norm(jacobian, 2).nan_to_num(0.0).item())
    return best


@pytest.mark.parametrize("name", CASES)
def test_the_constant_is_above_every_stretch_and_near_it(name):
    found = largest_stretch(CASES[name])
    bound = lipschitz_bound(Applied(CASES[name]).double(), SHAPE, bounds=(0.0, 1.0)).upper
    assert found <= bound * (1.0 + 1e-9)
    assert bound <= 2.0 * found


def test_a_variance_has_a_constant_on_a_box_alone():
    lipschitz_bound(Applied(CASES["std"]).double(), SHAPE)
    with pytest.raises(ValueError, match="no global Lipschitz constant"):
        lipschitz_bound(Applied(CASES["var"]).double(), SHAPE)


@pytest.mark.parametrize("name", CASES)
def test_values_lie_within_their_bounds(name):
    traced = trace(Applied(CASES[name]).double(), SHAPE)
    node = next(n for n in traced.steps if n.op == "placeholder")
    call = next(iter(node.users))
    last = traced.last
    generator = torch.Generator().manual_seed(2)
    centre, away = (torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    x = Interval(centre - away.abs(), centre + away.abs())
    known = last.interval(x, *call.args[1:], **call.kwargs)
    for _ in range(20):
        share = torch.rand(centre.shape, generator=generator, dtype=torch.float64).round()
        value = torch.where(share > 0.5, x.upper, x.lower)
        seen = torch.cat([last.apply(row[None], *call.args[1:], **call.kwargs) for row in value])
        assert bool((known.lower <= seen).all() and (seen <= known.upper).all())


@pytest.mark.filterwarnings("ignore:std")
def test_a_single_value_and_the_batch_axis_are_refused():
    with pytest.raises(ValueError, match="of 1 values has no Lipschitz constant"):
        lipschitz_bound(Applied(lambda x: x[:, :, :1, :1].std((2, 3))), SHAPE)
    with pytest.raises(ValueError, match=r"no Lipschitz rule for std over the batch's axis|batch"):
        lipschitz_bound(Applied(lambda x: x - x.std()), SHAPE)
