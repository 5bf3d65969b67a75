"""Elementwise bounds: what they are made from, and that no true value leaves them."""

import math
from fractions import Fraction

import pytest
import torch

from fastlip.lipschitz._intervals import Interval, upper_norm

INF = float("inf")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contains(interval: Interval, values: torch.Tensor) -> bool:
    return bool(((interval.lower <= values) & (values <= interval.upper)).all())


def test_box_is_the_domain_it_says():
    box = Interval.box(-0.5, torch.tensor([[1.0], [2.0]]), (2, 3))
    assert (box.batch, box.shape) == (1, (2, 3))
    assert box.lower.eq(-0.5).all()
    assert box.upper.tolist() == [[[1.0] * 3, [2.0] * 3]]
    assert math.sqrt(15.0) <= box.norm.item() <= math.sqrt(15.0) * (1.0 + 1e-13)
    with pytest.raises(ValueError, match="lower <= upper"):
        Interval.box(1.0, 0.0, (3,))
    with pytest.raises(ValueError, match="broadcast"):
        Interval.box(0.0, torch.ones(4), (3,))
    with pytest.raises(ValueError, match="NaN"):
        Interval.box(math.nan, 1.0, (3,))


def test_balls_hold_their_points_also_where_sums_round():
    x = random(4, 5, 3)
    radius = torch.tensor([0.0, 1e-17, 0.3, 1e20], dtype=torch.float64)
    for ball in (Interval.l2_ball(x, radius), Interval.linf_ball(x, radius)):
        for i in range(4):
            for value, low, high in zip(x[i].flatten(), ball.lower[i].flatten(), ball.upper[i].flatten(), strict=True):
                exact, r = Fraction(value.item()), Fraction(radius[i].item())
                assert Fraction(low.item()) <= exact - r <= exact + r <= Fraction(high.item())
    size = torch.linalg.vector_norm(x.flatten(1), dim=1)
    assert (Interval.l2_ball(x, radius).norm >= size + radius).all()
    assert Interval.l2_ball(x, 0.3).norm[2] < 0.31 + size[2]
    assert Interval.linf_ball(x, 0.3).norm[2] > 0.35 + size[2]  # the corner's norm, not the ball's
    for wrong in (-1.0, math.nan, torch.ones(3)):
        with pytest.raises(ValueError, match="radius"):
            Interval.l2_ball(x, wrong)


def test_norm_and_elements_sharpen_each_other():
    top = torch.full((2, 4), 3.0)
    interval = Interval(-top, top, torch.tensor([1.0, 100.0]))
    assert interval.magnitude()[0].eq(1.0).all()
    assert interval.norm[0] == 1.0
    assert 6.0 <= interval.norm[1] <= 6.0 + 1e-12


def test_nan_means_that_nothing_is_known():
    unknown = Interval(torch.tensor([[math.nan, 0.0]]), torch.tensor([[1.0, math.nan]]))
    assert unknown.lower.tolist() == [[-INF, 0.0]]
    assert unknown.upper.tolist() == [[1.0, INF]]
    assert unknown.norm.item() == INF
    known = Interval(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([math.nan]))
    assert known.norm.item() < 1.5


def test_hull_and_intersection():
    a, b = Interval.box(0.0, 1.0, (2,)), Interval.box(0.5, 2.0, (2,))
    both, either = a.intersection(b), a.hull(b)
    assert (both.lower.tolist(), both.upper.tolist()) == ([[0.5] * 2], [[1.0] * 2])
    assert (either.lower.tolist(), either.upper.tolist()) == ([[0.0] * 2], [[2.0] * 2])
    assert both.norm <= a.norm
    assert either.norm >= b.norm
    with pytest.raises(ValueError, match="empty"):
        a.intersection(Interval.box(1.5, 2.0, (2,)))
    nothing = Interval.unbounded((2,))
    assert a.intersection(nothing).norm == a.norm
    assert a.hull(nothing).norm.item() == INF


def test_centre_and_radius_reach_both_ends():
    low = random(3, 50, seed=1) * 10.0 ** (100.0 * random(3, 50, seed=2))
    high = low + random(3, 50, seed=3).abs() * 10.0 ** (100.0 * random(3, 50, seed=4))
    high[0, 0], low[1, 1], (low[2, 2], high[2, 2]) = INF, -INF, (-1.7e308, 1.7e308)
    centre, radius = Interval(low, high).centre_and_radius()
    for c, r, a, b in zip(*(t.flatten().tolist() for t in (centre, radius, low, high)), strict=True):
        assert math.isfinite(c)
        if math.isinf(a) or math.isinf(b):
            assert r == INF
        elif r < INF:
            assert Fraction(c) - Fraction(r) <= Fraction(a)
            assert Fraction(b) <= Fraction(c) + Fraction(r)
        else:
            assert b - a > 1e308


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e200, 1e307])
def test_norms_are_rounded_upwards(scale):
    t = (random(5, 40) * scale).abs()
    norm = upper_norm(t)
    for row, value in zip(t.tolist(), norm.tolist(), strict=True):
        square = sum(Fraction(v) ** 2 for v in row)
        assert value == INF or Fraction(value) ** 2 >= square
        assert Fraction(value) ** 2 <= square * Fraction(1 + 1e-12) + Fraction(1e-300) or value == INF
    assert upper_norm(torch.zeros(2, 3)).tolist() == [0.0, 0.0]
    assert upper_norm(torch.full((1, 2), INF)).tolist() == [INF]
