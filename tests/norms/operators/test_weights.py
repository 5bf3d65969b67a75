"""Bounds from one read of a weight: on its Frobenius norm and on || |A| ||, and whether it is finite."""

import itertools
import math

import pytest
import torch

from fastlip.norms import Operator, conv_norm, conv_operator
from fastlip.norms._operators.dense import dense_matrix
from fastlip.norms._operators.operator import compute_frobenius, require_finite
from fastlip.norms._operators.trim import simplify


def frobenius(weight: torch.Tensor) -> float:
    largest = weight.double().abs().max().item() if weight.numel() else 0.0
    return 0.0 if largest == 0.0 else largest * (weight.double() / largest).norm().item()


LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda w: w.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 3, 3), (64, 37, 3, 3), (130, 129, 1, 1)], ids=str)
def test_bounds_the_frobenius_norm_closely(dtype, layout, shape):
    weight = layout(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype))
    truth = frobenius(weight)
    assert truth <= Operator(weight).frobenius <= truth * (1.0 + 3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounds_it_at_any_magnitude(dtype):
    """Squares of float32 vanish below 1e-23 and overflow above 1e19, those of float64 beyond 1e-162 and 1e154."""
    generator = torch.Generator().manual_seed(0)
    powers = [-44, -38, -30, -22, -19, -10, 0, 10, 18, 19, 30, 37]
    for power in powers if dtype == torch.float32 else [*powers, -320, -300, -170, 150, 155, 300]:
        weight = torch.randn(40, 30, 2, 2, generator=generator, dtype=torch.float64) * 10.0**power
        # Besides entries whose squares underflow, ones that are far smaller.
        weight[::3] *= 1e-9
        weight = weight.to(dtype)
        truth = frobenius(weight)
        assert truth <= Operator(weight).frobenius <= truth * math.sqrt(weight.numel())
    assert Operator(torch.zeros(3, 4, 2, 2, dtype=dtype)).frobenius == 0.0
    assert Operator(torch.zeros(0, 4, dtype=dtype)).frobenius == 0.0
    tiny = torch.zeros(40, 30, 2, 2, dtype=dtype)
    tiny[7, 3, 1, 0] = torch.finfo(dtype).smallest_normal
    assert Operator(tiny).frobenius >= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", [0, 1500, -1])
def test_what_is_not_finite_shows(value, dtype, position):
    weight = torch.randn(20, 30, 3, 3).to(dtype)
    weight.view(-1)[position] = value
    op = Operator(weight)
    assert not math.isfinite(op.frobenius)
    with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        require_finite(op)
    with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        conv_norm(weight, (4, 4), padding=1)


def test_a_finite_weight_whose_frobenius_norm_overflows_has_a_norm():
    weight = torch.diag_embed(torch.full((20,), 1e308, dtype=torch.float64))[..., None, None]
    assert math.isinf(Operator(weight).frobenius)
    require_finite(Operator(weight))
    interval = conv_norm(weight, (1, 1))
    assert interval.lower == pytest.approx(1e308, rel=1e-9)
    assert interval.lower <= interval.upper < math.inf


def test_all_are_looked_at_at_once(monkeypatch):
    ops = [Operator(torch.randn(3, 4)) for _ in range(5)]
    known = ops[2].frobenius
    seen = []
    monkeypatch.setattr(
        "fastlip.norms._operators.operator._frobenius_norms", lambda ws: seen.append(len(ws)) or [1.0] * len(ws)
    )
    compute_frobenius(ops)
    compute_frobenius(ops)
    assert seen == [4]
    assert [op.frobenius for op in ops] == [1.0, 1.0, known, 1.0, 1.0]


def test_a_part_of_a_weight_inherits_its_bound():
    """Trimming keeps the bound of the whole weight; a new weight has its own."""
    op = conv_operator(torch.randn(4, 3, 5, 5), (2, 2), padding=2)
    small = simplify(op)
    assert small is not op
    assert small.frobenius == op.frobenius >= frobenius(small.weight)
    assert op.with_weight(op.weight * 100).frobenius > 50 * op.frobenius


GEOMETRIES = [
    {"stride": s, "padding": p, "dilation": d, "groups": g, "padding_mode": m}
    for s, p, d, g, m in itertools.product(
        (1, 2), (0, 1, 2), (1, 2), (1, 2), ("zeros", "circular", "reflect", "replicate")
    )
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g.values())))
def test_absolute_bound_is_above_the_norm_of_the_absolute_values(geometry):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 4 // geometry["groups"], 3, 2, generator=generator, dtype=torch.float64)
    op = conv_operator(weight, (6, 5), **geometry)
    positive = op.with_weight(weight.abs())
    assert torch.linalg.matrix_norm(dense_matrix(positive), 2).max() <= op.absolute_bound
