"""Random networks on random balls: local bounds hold or are refused, and the search that judges them is a good one."""

import itertools

import pytest
import torch
from random_balls import BallVerdict, judge_balls, largest_stretch_in_ball
from torch import nn

from fastlip.lipschitz import BallBounds

_CHUNK = 50


@pytest.mark.parametrize("start", range(0, 200, _CHUNK))
def test_local_bounds_hold_or_are_refused(start: int) -> None:
    verdicts = [judge_balls(seed) for seed in range(start, start + _CHUNK)]
    assert not [v for v in verdicts if v.unsound or v.outcome == "crashed"]
    assert sum(v.outcome == "accepted" for v in verdicts) > 0.4 * _CHUNK


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_search_attains_the_norm_of_what_is_linear_on_the_ball(norm: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double()
    model = nn.Sequential(linear, nn.ReLU())
    with torch.no_grad():
        linear.bias.fill_(50.0)
    found = largest_stretch_in_ball(model, torch.zeros(5).double(), 1.0, norm, torch.Generator().manual_seed(0))
    norm_of = torch.linalg.matrix_norm(linear.weight, 2).item()
    assert 0.95 * norm_of < found <= norm_of * (1.0 + 1e-6)


def test_the_search_stays_in_the_ball() -> None:
    """Beyond a distance of 1 from 0 the function is steep."""

    class Steep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            length = x.flatten(1).norm(dim=1, keepdim=True)
            return x + 1e6 * (length - 1.0).clamp_min(0.0) * x

    for radius, norm in itertools.product((0.2, 0.5), ("l2", "linf")):
        found = largest_stretch_in_ball(
            Steep(), torch.zeros(3).double(), radius, norm, torch.Generator().manual_seed(0)
        )
        assert found == pytest.approx(1.0, rel=1e-3)


def test_a_wrong_bound_would_show() -> None:
    verdict = judge_balls(next(seed for seed in range(50) if judge_balls(seed).outcome == "accepted"))
    assert verdict.bounds is not None
    assert not verdict.unsound
    b = verdict.bounds
    low = BallBounds(0.0 * b.lower, 0.5 * torch.tensor(verdict.found), b.points, b.radius, b.norm, b.confidence)
    assert BallVerdict(0, "accepted", bounds=low, found=verdict.found).unsound
    lower = BallBounds(2.0 * b.upper, b.upper, b.points, b.radius, b.norm, b.confidence)
    assert BallVerdict(0, "accepted", bounds=lower, found=(0.0, 0.0, 0.0)).unsound
