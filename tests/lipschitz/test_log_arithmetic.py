"""Logarithms of bounds are rounded outwards, however many factors there are."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from torch import Tensor, nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._log_arithmetic import add, exp10, log10, multiply


def draws(count: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(count, generator=generator, dtype=torch.float64)
    return (signs * 10.0 ** (6.0 * torch.rand(count, generator=generator, dtype=torch.float64) - 3.0)).tolist()


def test_products_are_exact_or_above() -> None:
    for a, b in zip(draws(2000, 0), draws(2000, 1), strict=True):
        total = Fraction(a) + Fraction(b)
        found = Fraction(multiply(a, b))
        assert total <= found <= total + abs(total) * Fraction(1, 2**51) + Fraction(1, 2**1000)
    assert multiply(0.5, 0.25) == 0.75
    for infinite, zero in ((math.inf, -math.inf), (-math.inf, math.inf), (-math.inf, 3.0)):
        assert multiply(infinite, zero) == -math.inf


def test_logarithms_and_powers_are_above() -> None:
    with mpmath.workdps(60):
        for x in (abs(v) for v in draws(500, 2)):
            true = mpmath.log10(mpmath.mpf(x))
            assert 0 <= mpmath.mpf(log10(x)) - true <= mpmath.mpf(4e-16) * (1 + abs(true))
        for log in (v / 10.0 for v in draws(500, 3)):
            if abs(log) < 300:
                assert 0 <= mpmath.mpf(exp10(log)) / mpmath.power(10, mpmath.mpf(log)) - 1 <= 1e-15
    assert (log10(1.0), exp10(0.0), log10(0.0), exp10(-math.inf), exp10(400.0)) == (0.0, 1.0, -math.inf, 0.0, math.inf)


@pytest.mark.parametrize("shift", [0.0, 250.0, 1e4, -1e4])
def test_sums_are_above(shift: float) -> None:
    with mpmath.workdps(60):
        for seed in range(200):
            logs = [v / 100.0 + shift for v in draws(1 + seed % 5, seed)]
            true = mpmath.log10(mpmath.fsum(mpmath.power(10, mpmath.mpf(v)) for v in logs))
            assert -1e-50 <= mpmath.mpf(add(logs)) - true <= 1e-13 * (1 + abs(true)), logs
    assert add([-math.inf, 2.5]) == 2.5
    assert add([-math.inf, -math.inf]) == -math.inf
    assert add([math.inf, 2.0]) == math.inf


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3000):
            x = x + x
        return x


def test_three_thousand_sums_stay_above_the_truth() -> None:
    bound = lipschitz_bound(Doubled(), (1,))
    with mpmath.workdps(60):
        excess = mpmath.mpf(bound.log10_upper) - 3000 * mpmath.log10(2)
    assert 0 <= excess <= 1e-8
    assert bound.upper == math.inf


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_overflowing_layer_beside_one_of_zeros(order: tuple[int, int]) -> None:
    layers = [nn.Linear(2, 2, dtype=torch.float64) for _ in range(2)]
    layers[0].weight.data.fill_(1.7e308)
    layers[1].weight.data.zero_()
    bound = lipschitz_bound(nn.Sequential(*(layers[i] for i in order)), (2,))
    assert bound.log10_upper == -math.inf
    assert bound.upper == 0.0
    assert not math.isnan(bound.log10_product)
    assert not math.isnan(bound.log10_margin)
