"""Convolutions on large inputs by their symbol: both sides, coarse grids, and when it is tried at all."""

import math

import pytest
import torch
from torch import Tensor

from fastlip.norms import NormOptions, Operator, conv_norm, conv_operator, operator_norms
from fastlip.norms._operators.dense import dense_matrix
from fastlip.norms._solvers import symbols
from fastlip.norms._solvers.symbols import symbol_interval, takes_symbol


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small operators too are taken by their symbol."""
    monkeypatch.setattr(symbols, "_pays", lambda *_: True)


def truth(op: Operator) -> float:
    return max(torch.linalg.matrix_norm(matrix, 2).item() for matrix in dense_matrix(op))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rtol", [1e-2, 4e-2, 0.2])
@pytest.mark.parametrize(
    ("shape", "size", "settings"),
    [
        ((3, 2, 3), 40, {"padding": 1}),
        ((2, 3, 5), 41, {"padding": 2}),
        ((2, 2, 4), 40, {"padding": 1}),
        ((4, 3, 3), 40, {"padding": 1, "stride": 2}),
        ((8, 2, 5), 43, {"padding": 2, "stride": 3}),
        ((4, 2, 3), 40, {"padding": 2, "dilation": 2}),
        ((4, 2, 3), 41, {"padding": 2, "dilation": 2, "stride": 2}),
        ((6, 2, 3), 40, {"padding": 1, "groups": 3}),
        ((6, 1, 7), 64, {"padding": 3, "groups": 6}),
        ((3, 2, 3), 40, {"padding": 1, "padding_mode": "circular"}),
        ((4, 2, 3), 40, {"padding": 1, "padding_mode": "circular", "stride": 2}),
        ((20, 18, 3), 30, {"padding": 1}),  # in float32
        ((2, 2, 3, 3), 20, {"padding": 1}),
        ((4, 1, 3, 3), 21, {"padding": 1, "stride": 2}),
    ],
)
def test_the_norm_lies_between_both_sides(
    always: None, shape: tuple[int, ...], size: int, settings: dict[str, int], rtol: float
) -> None:
    op = conv_operator(drawn(*shape), size, **settings)  # type: ignore[arg-type]
    exact, options = truth(op), NormOptions(rtol=rtol)
    interval = symbol_interval(op, options)
    if interval is None:  # the ring is too far above, or the wave too far below
        assert rtol == 1e-2
        return
    assert interval.lower <= exact * (1.0 + 1e-12)
    assert exact <= interval.upper <= interval.lower * (1.0 + rtol)
    assert (interval.method, interval.confidence, interval.converged) == ("ring", 1.0, True)


def test_a_peak_between_two_frequencies_of_a_coarse_grid(always: None) -> None:
    options = NormOptions(rtol=0.2)
    plan = symbols._plan(conv_operator(torch.ones(2, 2, 3), 200, padding=1), options)
    assert plan is not None
    assert plan.grid[0] < 20
    turn = math.pi / plan.grid[0]
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    # The symbol is 1 + 2 cos(w + turn) in one direction: 3 in the middle between two frequencies.
    op = conv_operator(torch.stack([rotation, torch.eye(2), rotation.mT], dim=2), 200, padding=1)
    exact = truth(op)
    assert exact > 1.01 * (1.0 + 2.0 * math.cos(turn))
    interval = symbol_interval(op, options)
    assert interval is not None
    assert interval.lower <= exact * (1.0 + 1e-12)
    assert exact <= interval.upper


def test_any_scale_and_an_empty_tap() -> None:
    weight = drawn(32, 32, 3, 3).double()
    weight[:, :, 0] = 0.0
    reference = conv_norm(weight, 40, padding=1, method="lanczos", generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1.0, 1e30):
        interval = conv_norm(weight * scale, 40, padding=1)
        assert interval.method == "ring"
        assert interval.lower <= reference.upper * scale
        assert reference.lower * scale <= interval.upper


def test_what_takes_less_time_is_tried() -> None:
    large = conv_operator(drawn(32, 32, 3, 3), 56, padding=1)
    assert takes_symbol(large, NormOptions())
    assert not takes_symbol(large, NormOptions(method="lanczos"))
    assert not takes_symbol(conv_operator(drawn(32, 32, 3, 3), 14, padding=1), NormOptions())
    assert not takes_symbol(conv_operator(drawn(512, 512, 3, 3), 24, padding=1), NormOptions())
    assert not takes_symbol(conv_operator(drawn(32, 32, 3, 3), 56, padding=1, padding_mode="reflect"), NormOptions())


def test_it_is_certain_and_takes_no_share_of_the_others_chance() -> None:
    ops = [
        conv_operator(drawn(32, 32, 3, 3), 56, padding=1),
        conv_operator(drawn(16, 16, 3, 3), 12, padding=1, padding_mode="reflect"),
    ]
    certain, drawn_ = operator_norms(ops, confidence=0.9)
    assert certain.confidence == 1.0
    assert drawn_.confidence == pytest.approx(0.9)
