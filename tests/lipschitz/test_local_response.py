"""Local response normalisation: constants above every stretch and near it, and values within their bounds."""

import math

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval

#: Window, alpha, beta, k and channels: torch's own, AlexNet's, steep ones, even and wide windows, no division at all.
CASES = [
    (5, 1e-4, 0.75, 1.0, 6), (5, 1e-4, 0.75, 2.0, 6), (3, 2.0, 0.75, 0.5, 5), (4, 1.0, 0.5, 1.0, 7),
    (9, 3.0, 1.5, 0.3, 4), (1, 1.0, 1.0, 1.0, 3), (5, 0.0, 0.75, 2.0, 3), (5, 1.0, 0.0, 2.0, 3),
]  # fmt: skip


def largest_stretch(module, shape, scale):
    """Of Jacobians at random points and at those to which gradient ascent leads from them."""
    generator = torch.Generator().manual_seed(1)
    best = 0.0
    for _ in range(3):
        x = scale * (2.0 * torch.rand(1, *shape, generator=generator, dtype=torch.float64) - 1.0)
        for _ in range(6):
            x = x.requires_grad_()
            jacobian = torch.autograd.functional.jacobian(module, x, create_graph=True)
            norm = torch.linalg.matrix_norm(jacobian.reshape(-1, math.prod(shape)), 2)
            best = max(best, norm.item())
            if not norm.requires_grad:  # a linear map
                break
            (slope,) = torch.autograd.grad(norm, x, allow_unused=True)
            if slope is None or not slope.any():
                break
            x = (x + 0.2 * scale * slope / slope.abs().max()).clamp(-scale, scale).detach()
    return best


@pytest.mark.parametrize(("size", "alpha", "beta", "k", "channels"), CASES)
def test_the_constant_is_above_every_stretch_and_near_it(size, alpha, beta, k, channels):
    module, shape = nn.LocalResponseNorm(size, alpha, beta, k).double(), (channels, 1, 2)
    everywhere = lipschitz_bound(module, shape).upper
    within = lipschitz_bound(module, shape, bounds=(-1.0, 1.0)).upper
    found = largest_stretch(module, shape, 1.0)
    assert found <= within * (1.0 + 1e-12)
    assert within <= everywhere * (1.0 + 1e-12)
    for scale in (0.1, 30.0):
        assert largest_stretch(module, shape, scale) <= everywhere * (1.0 + 1e-12)
    assert everywhere <= 3.5 * k**-beta * (1.0 + 1e-9)
    assert everywhere >= k**-beta * (1.0 - 1e-9)  # the slope at 0


def test_small_values_are_hardly_divided():
    module = nn.LocalResponseNorm(5).double()
    assert lipschitz_bound(module, (8, 2, 2), bounds=(0.0, 1.0)).upper < 1.0005
    assert lipschitz_bound(module, (8, 2, 2)).upper > 1.5


def test_the_function_has_the_modules_constant():
    function = Applied(lambda x: F.local_response_norm(x, 3, beta=0.5, k=0.7)).double()
    module = nn.LocalResponseNorm(3, beta=0.5, k=0.7).double()
    assert lipschitz_bound(function, (4, 2, 2)).upper == lipschitz_bound(module, (4, 2, 2)).upper


@pytest.mark.parametrize(("size", "alpha", "beta", "k", "channels"), CASES)
def test_values_lie_within_their_bounds(size, alpha, beta, k, channels):
    shape = (channels, 2, 2)
    traced = trace(nn.LocalResponseNorm(size, alpha, beta, k).double(), shape)
    generator = torch.Generator().manual_seed(2)
    centre, away = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = Interval(centre - away.abs(), centre + away.abs())
    known = traced.last.interval(x)
    for _ in range(20):
        at = torch.rand(centre.shape, generator=generator, dtype=torch.float64)
        seen = traced.last.module(torch.lerp(x.lower, x.upper, at.round() if at.flatten()[0] < 0.5 else at))
        assert bool((known.lower <= seen).all() and (seen <= known.upper).all())


@pytest.mark.parametrize(("alpha", "beta", "k"), [(-1.0, 0.75, 1.0), (1.0, -0.5, 1.0), (1.0, 0.75, 0.0)])
def test_what_has_no_known_constant_is_refused(alpha, beta, k):
    with pytest.raises(ValueError, match=r"LocalResponseNorm with alpha .* has no known Lipschitz constant"):
        lipschitz_bound(nn.LocalResponseNorm(3, alpha, beta, k), (4, 2, 2))
