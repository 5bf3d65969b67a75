"""Waves that a convolution stretches about the most, and the steps that start from them."""

import math

import pytest
import torch
from torch import nn

from fastlip.norms import Operator, constrain_norms, conv_operator, operator_norms, spectral_penalty
from fastlip.norms._constrain.whole_model import constrained_layers
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._solvers import krylov_steps as steps_module
from fastlip.norms._solvers.krylov_steps import krylov_steps
from fastlip.norms._solvers.waves import leading_wave

GEOMETRIES = {
    "plain": ((4, 3, 3, 3), 16, {"padding": 1}),
    "strided": ((6, 3, 4, 4), 24, {"stride": 2, "padding": 1}),
    "dilated": ((4, 3, 3, 3), 20, {"dilation": 2, "padding": 2}),
    "groups": ((6, 2, 3, 3), 16, {"groups": 3, "padding": 1}),
    "circular": ((4, 3, 3, 3), 12, {"padding": 1, "padding_mode": "circular"}),
    "one axis": ((4, 3, 5), 40, {"padding": 2}),
    "three axes": ((2, 2, 2, 2, 2), 12, {}),
    "pointwise": ((5, 3, 1, 1), 12, {}),
}


def stretch(op: Operator, vector: torch.Tensor) -> float:
    vector = vector.double()
    image = TorchOperator(op, op.weight.double()).forward(vector[None] / vector.norm())
    return image.norm().item()


def edges(horizontal: float, vertical: float) -> torch.Tensor:
    """A kernel of two filters, each with an input channel of its own."""
    edge = torch.tensor([1.0, 0.0, -1.0]).expand(3, 3)
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0], weight[1, 1] = vertical * edge, horizontal * edge.mT
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_waves_are_stretched_nearly_as_much_as_anything(name: str, dtype: torch.dtype) -> None:
    shape, size, kwargs = GEOMETRIES[name]
    for _ in range(5):
        op = conv_operator(torch.randn(shape, dtype=dtype), size, **kwargs)
        norm = operator_norms([op], rtol=1e-3)[0]
        wave = leading_wave(op, 0.0)
        assert wave is not None
        assert (wave.shape, wave.dtype) == (op.input_shape, dtype)
        assert 0.8 * norm.lower < stretch(op, wave) <= norm.upper * (1 + 1e-5)
        assert leading_wave(op, 2.0 * norm.upper) is None


def test_filters_in_pairs_of_opposite_sign() -> None:
    """Their sum is 0 at every frequency."""
    weight = torch.randn(4, 3, 3, 3)
    op = conv_operator(torch.cat([weight, -weight]), 16, padding=1)
    wave = leading_wave(op, 0.0)
    assert wave is not None
    assert stretch(op, wave) > 0.8 * operator_norms([op], rtol=1e-3)[0].lower


def test_few_frequencies_at_a_time_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    op = conv_operator(torch.randn(6, 2, 3, 3), 16, padding=1, groups=3)
    expected = leading_wave(op, 0.0)
    monkeypatch.setattr("fastlip.norms._solvers.waves.MOST_ENTRIES", 1)
    torch.testing.assert_close(leading_wave(op, 0.0), expected)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
def test_waves_at_any_magnitude(scale: float) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    op = conv_operator(weight * scale**8, 12, padding=1)
    expected = leading_wave(conv_operator(weight, 12, padding=1), 0.0)
    torch.testing.assert_close(leading_wave(op, 0.0), expected, rtol=1e-4, atol=1e-4)
    narrow = leading_wave(conv_operator((weight * scale).float(), 12, padding=1), 0.0)
    torch.testing.assert_close(narrow, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "op",
    [
        Operator(torch.randn(20, 30)),
        conv_operator(torch.randn(4, 3, 3, 3), 11, padding=1),
        conv_operator(torch.randn(4, 3, 3, 3), 16, padding=1, padding_mode="reflect"),
        conv_operator(torch.zeros(4, 3, 3, 3), 16, padding=1),
        conv_operator(torch.zeros(4, 3, 3, 3), 16, padding=1).with_weight(torch.full((4, 3, 3, 3), math.nan)),
        conv_operator(torch.zeros(4, 3, 3, 3), 16, padding=1).with_weight(torch.full((4, 3, 3, 3), math.inf)),
    ],
    ids=["matrix", "small", "reflect", "zeros", "nan", "inf"],
)
def test_what_has_no_wave(op: Operator) -> None:
    assert leading_wave(op, 0.0) is None


def test_a_wave_of_another_frequency_overtakes() -> None:
    """The other filter's channel is none of the vectors', nor of what the operator makes of them."""
    op = conv_operator(edges(1.0, 1.2), 16, padding=1)
    truth = operator_norms([op], rtol=1e-4)[0].lower
    weaker = op.with_weight(edges(1.0, 0.0))
    vectors = torch.stack([krylov_steps(weaker, torch.randn(2, 2, 16, 16), 60).vectors[0], torch.zeros(2, 16, 16)])
    vectors[1, 1] = torch.randn(16, 16)  # in the weaker one's channel too
    assert krylov_steps(op, vectors, 4).norms[1] < 0.9 * truth
    assert krylov_steps(op, vectors, 4, waves=True).norms[1] > 0.98 * truth


def test_a_wave_that_does_not_overtake_changes_nothing() -> None:
    op = conv_operator(edges(1.0, 1.5), 16, padding=1)
    vectors = krylov_steps(op, torch.randn(2, 2, 16, 16), 60).vectors
    found, expected = krylov_steps(op, vectors, 2, waves=True), krylov_steps(op, vectors, 2)
    assert found.norms[1].item() == pytest.approx(expected.norms[1].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["convolution", "matrix"])
def test_steps_end_where_a_convolutions_norm_stands_still(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = conv_operator(edges(1.0, 1.5), 8, padding=1) if kind == "convolution" else Operator(torch.randn(20, 30))
    taken = []
    expansion = steps_module._expansion
    monkeypatch.setattr(steps_module, "_expansion", lambda *args: (taken.append(1), expansion(*args))[1])
    settled = krylov_steps(op, torch.randn(2, *op.input_shape), 40).vectors
    taken.clear()
    krylov_steps(op, settled + 1e-3 * torch.randn_like(settled), 1, 8)
    assert len(taken) == 8 if kind == "matrix" else 1 <= len(taken) < 8
    taken.clear()
    krylov_steps(op, torch.randn(2, *op.input_shape), 1, 8)
    assert len(taken) > 3


@pytest.mark.parametrize("what", ["constraint", "penalty"])
def test_a_tracked_norm_follows_another_frequency(what: str) -> None:
    """The wave of one filter overtakes that of the other while both change a little in each step."""
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    conv.weight.data.copy_(edges(1.2, 1.0))
    model, x = nn.Sequential(conv), torch.randn(1, 2, 16, 16)
    penalty = spectral_penalty(model, (2, 16, 16), bound=0.1)
    if what == "constraint":
        constrain_norms(model, (2, 16, 16), bound=0.1).train()
    for step in range(60):
        share = step / 59
        weight = edges(1.2 - 0.2 * share, 1.0 + 0.4 * share)
        with torch.no_grad():
            held = conv.parametrizations.weight.original if what == "constraint" else conv.weight
            held.copy_(weight)
        if what == "constraint":
            model(x)
            tracked = float(constrained_layers(model)[0][0].tracking.norm)
        else:
            tracked = penalty.norms()["0"].item()
        truth = operator_norms([conv_operator(weight, 16, padding=1)], rtol=1e-3)[0].lower
        assert 0.95 * truth < tracked <= truth * (1 + 2e-3)
