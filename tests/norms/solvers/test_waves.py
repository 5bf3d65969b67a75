"""Waves that a convolution stretches about the most, and the steps that start from them."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlip.norms import Operator, constrain_norms, conv_operator, operator_norms, spectral_penalty
from fastlip.norms._constrain.whole_model import constrained_layers
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._solvers import krylov_steps as steps_module
from fastlip.norms._solvers.krylov_steps import krylov_steps
from fastlip.norms._solvers.waves import Waves, _Blocks, _taps, _Windows, has_waves

GEOMETRIES = {
    "plain": ((4, 3, 3, 3), 16, {"padding": 1}),
    "strided": ((6, 3, 4, 4), 24, {"stride": 2, "padding": 1}),
    "dilated": ((4, 3, 3, 3), 20, {"dilation": 2, "padding": 2}),
    "groups": ((6, 2, 3, 3), 16, {"groups": 3, "padding": 1}),
    "circular": ((4, 3, 3, 3), 12, {"padding": 1, "padding_mode": "circular"}),
    "one axis": ((4, 3, 5), 40, {"padding": 2}),
    "three axes": ((2, 2, 2, 2, 2), 12, {}),
    "depthwise": ((5, 1, 3, 3), 14, {"groups": 5, "padding": 1}),
    "depthwise, strided": ((4, 1, 3, 3), 14, {"groups": 4, "padding": 1, "stride": 2}),
    "stride above the kernel": ((4, 2, 2, 2), 18, {"stride": 3}),
    "pointwise": ((5, 3, 1, 1), 12, {}),
}


def largest_of_groups(op: Operator, vector: torch.Tensor) -> float:
    """The largest stretch of a group's part of a vector."""
    vector = vector.double()
    image = TorchOperator(op, op.weight.double()).forward(vector[None])[0]
    lengths = vector.view(op.groups, -1).norm(dim=1)
    return (image.view(op.groups, -1).norm(dim=1) / lengths.clamp_min(1e-30)).max().item()


def edges(horizontal: float, vertical: float) -> torch.Tensor:
    """A kernel of two filters, each with an input channel of its own."""
    edge = torch.tensor([1.0, 0.0, -1.0]).expand(3, 3)
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0], weight[1, 1] = vertical * edge, horizontal * edge.mT
    return weight


def random_operator(name: str, dtype: torch.dtype) -> Operator:
    shape, size, kwargs = GEOMETRIES[name]
    return conv_operator(torch.randn(shape, dtype=dtype), size, **kwargs)


def norm_on_grid(op: Operator) -> float:
    """The largest norm of the symbol at the frequencies of :class:`Waves`.

    The frequencies of a ring of so many pixels are those, so that it is the norm of the circular convolution on it.
    """
    ring = []
    for k, d, s, n in zip(op.kernel, op.dilation, op.stride, op.input_size, strict=True):
        taps = -(-((k - 1) * d + 1) // s)
        ring.append(s * (min(n // s, 2 * taps + 2) if taps > 1 else 1))
    circular = replace(
        op,
        weight=op.weight.double(),
        input_size=tuple(ring),
        padding=tuple((0, (k - 1) * d) for k, d in zip(op.kernel, op.dilation, strict=True)),
        padding_mode="circular",
    )
    identity = torch.eye(math.prod(circular.input_shape), dtype=torch.float64).view(-1, *circular.input_shape)
    images = TorchOperator(circular, circular.weight).forward(identity).flatten(1)
    return torch.linalg.matrix_norm(images, 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_waves_end_at_the_norm_of_the_symbol(name: str, dtype: torch.dtype) -> None:
    for _ in range(3):
        op = random_operator(name, dtype)
        assert has_waves(op)
        waves, truth = Waves(op), norm_on_grid(op)
        stretches = [waves.leading(op)[1] for _ in range(40)]
        assert stretches[0] > 0.9 * truth
        assert max(stretches) <= truth * (1 + 1e-4)
        assert stretches[-1] > 0.995 * truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_vector_is_stretched_nearly_as_much_as_anything(name: str, dtype: torch.dtype) -> None:
    for _ in range(5):
        op = random_operator(name, dtype)
        norm = operator_norms([op], rtol=1e-3)[0]
        vector = Waves(op).overtaking(op, 1e-3 * norm.lower)
        assert vector is not None
        assert (vector.shape, vector.dtype) == (op.input_shape, dtype)
        assert 0.85 * norm.lower < largest_of_groups(op, vector) <= norm.upper * (1 + 1e-5)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_both_ways_to_apply_symbols(name: str) -> None:
    """They are the same map, and the adjoint is that of it."""
    op = random_operator(name, torch.float32)
    weight, phases = op.weight.unflatten(0, (op.groups, -1)).flatten(3), math.prod(op.stride)
    phase, shifts = _taps(op)
    angles = (Waves(op).frequencies @ shifts).float()
    turns = torch.polar(torch.ones_like(angles), angles)
    windows = _Windows(weight, turns, phase, phases)
    x = torch.randn(len(turns), op.groups, weight.shape[2] * phases, dtype=torch.complex64)
    y = torch.randn(len(turns), op.groups, weight.shape[1], dtype=torch.complex64)
    ours, theirs = (y.conj() * windows.forward(x)).sum(), (windows.adjoint(y).conj() * x).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    if phases == 1:
        blocks = _Blocks(weight, turns)
        torch.testing.assert_close(blocks.forward(x), windows.forward(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(blocks.adjoint(y), windows.adjoint(y), rtol=1e-4, atol=1e-4)


def test_waves_follow_a_weight_that_changes() -> None:
    """A look of few steps is enough for a weight that has changed a little since the last one."""
    weight, towards = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    waves = Waves(conv_operator(weight, 16, padding=1))
    for step in range(60):
        share = min(step / 40, 1.0)
        op = conv_operator((1.0 - share) * weight + share * towards, 16, padding=1)
        _, stretch = waves.leading(op)
        assert stretch > 0.95 * norm_on_grid(op)
    assert stretch > 0.99 * norm_on_grid(op)


def test_filters_in_pairs_of_opposite_sign() -> None:
    """Their sum is 0 at every frequency."""
    weight = torch.randn(4, 3, 3, 3)
    op = conv_operator(torch.cat([weight, -weight]), 16, padding=1)
    assert Waves(op).leading(op)[1] > 0.9 * norm_on_grid(op)


def test_few_frequencies_at_a_time_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    op = random_operator("groups", torch.float32)
    waves, few = Waves(op), Waves(op)
    expected = [waves.leading(op)[1] for _ in range(2)]
    monkeypatch.setattr("fastlip.norms._solvers.waves.MOST_ENTRIES", 1)
    assert [few.leading(op)[1] for _ in range(2)] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(few.amplitudes, waves.amplitudes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-7, 1e-5, 1e5, 1e7, 1e30, 1e37])
def test_waves_at_any_magnitude(scale: float) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    op = conv_operator(weight, 12, padding=1)
    expected = Waves(op).leading(op)[1]
    for factor, other in ((scale**8, (weight * scale**8)), (scale, (weight * scale).float())):
        op = conv_operator(other, 12, padding=1)
        assert Waves(op).leading(op)[1] / factor == pytest.approx(expected, rel=2e-2)
        assert Waves(op).overtaking(op, 0.1 * expected * factor) is not None


@pytest.mark.parametrize(
    "op",
    [
        Operator(torch.randn(20, 30)),
        conv_operator(torch.randn(4, 3, 3, 3), 11, padding=1),
        conv_operator(torch.randn(4, 3, 3, 3), 16, padding=1, padding_mode="reflect"),
    ],
    ids=["matrix", "small", "reflect"],
)
def test_what_has_no_waves(op: Operator) -> None:
    assert not has_waves(op)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_weights_without_a_wave(value: float) -> None:
    op = conv_operator(torch.randn(4, 3, 3, 3), 16, padding=1)
    waves, without = Waves(op), op.with_weight(torch.full((4, 3, 3, 3), value))
    assert waves.leading(without) is None
    assert waves.overtaking(without, 1.0) is None
    assert waves.overtaking(op, 0.0) is None
    assert waves.overtaking(op, math.nan) is None
    assert waves.overtaking(op, 1e-3) is not None


def test_a_wave_overtakes_once() -> None:
    """Afterwards the one that has grown in terms of the norm does, whether that is another or the same."""
    op = conv_operator(torch.randn(6, 4, 3, 3), 16, padding=1)
    waves = Waves(op)
    for _ in range(40):
        _, stretch = waves.leading(op)
    assert waves.overtaking(op, 2.0 * stretch) is None
    assert waves.overtaking(op, stretch / 1.1) is not None
    assert waves.overtaking(op, stretch / 1.1) is None
    assert waves.overtaking(op, stretch / 1.05) is None
    assert waves.overtaking(op, stretch / 1.06) is not None
    assert waves.overtaking(op.with_weight(3.0 * op.weight), stretch / 1.06) is not None


def test_a_wave_of_another_frequency_overtakes() -> None:
    """The other filter's channel is none of the vectors', nor of what the operator makes of them."""
    op = conv_operator(edges(1.0, 1.2), 16, padding=1)
    truth = operator_norms([op], rtol=1e-4)[0].lower
    weaker = op.with_weight(edges(1.0, 0.0))
    vectors = torch.stack([krylov_steps(weaker, torch.randn(2, 2, 16, 16), 60).vectors[0], torch.zeros(2, 16, 16)])
    vectors[1, 1] = torch.randn(16, 16)  # in the weaker one's channel too
    assert krylov_steps(op, vectors, 4).norms[1] < 0.9 * truth
    wave = Waves(op).overtaking(op, 0.9 * truth)
    assert wave is not None
    assert krylov_steps(op, torch.cat([vectors, wave[None]]), 4).norms[1] > 0.98 * truth


def test_a_wave_that_does_not_overtake_changes_nothing() -> None:
    op = conv_operator(edges(1.0, 1.5), 16, padding=1)
    expected = krylov_steps(op, torch.randn(2, 2, 16, 16), 60)
    wave = Waves(op).overtaking(op, 0.9 * expected.norms[1].item())
    assert wave is not None
    found = krylov_steps(op, torch.cat([expected.vectors, wave[None]]), 2)
    assert found.vectors.shape == (2, 2, 16, 16)
    assert found.norms[1].item() == pytest.approx(krylov_steps(op, expected.vectors, 2).norms[1].item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["convolution", "matrix"])
def test_steps_end_where_a_convolutions_norm_stands_still(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = conv_operator(edges(1.0, 1.5), 8, padding=1) if kind == "convolution" else Operator(torch.randn(40, 50))
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


@pytest.mark.parametrize("how", ["deepcopy", "inference"])
def test_waves_are_kept(how: str) -> None:
    """In copies, and from forwards in inference mode to those of training."""
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), torch.rand(1, 2, 16, 16)
    constrain_norms(model, (2, 16, 16), bound=0.1)
    with torch.inference_mode(how == "inference"):
        for _ in range(8):
            model(x)
    other = model if how == "inference" else copy.deepcopy(model)
    (constraint, _), (kept, _) = constrained_layers(model)[0], constrained_layers(other)[0]
    assert constraint.tracking.waves is not None
    torch.testing.assert_close(kept.tracking.waves.amplitudes, constraint.tracking.waves.amplitudes)
    for _ in range(8):
        model(x).sum().backward()
        if other is not model:
            other(x)
            assert kept.tracking.norm == constraint.tracking.norm


def test_many_phases_and_taps_take_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory at once is as much as the windows of a few waves, whatever the stride and the kernel."""
    op = conv_operator(torch.randn(2, 2, 40, 40), 96, stride=20)
    waves, made = Waves(op), []
    polar = torch.polar
    monkeypatch.setattr(torch, "polar", lambda *args: (made.append(args[0].numel()), polar(*args))[1])
    assert waves.leading(op) is not None
    assert max(made) == len(waves.frequencies) * 1600
    assert len(Waves(conv_operator(torch.randn(1, 1, 31, 31), 64, padding=15)).frequencies) <= 16 * 9


@pytest.mark.parametrize("scale", [1e-18, 1e-19, 1e-20, 1e-22, 1e-30, 1e-40, 0.0])
@pytest.mark.parametrize("what", ["constraint", "penalty"])
def test_a_channel_that_is_nearly_empty(what: str, scale: float) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    with torch.no_grad():
        model[0].weight[3] *= scale
    truth = operator_norms([conv_operator(model[0].weight.detach(), 12, padding=1, groups=4)], rtol=1e-4)[0]
    penalty = spectral_penalty(model, (4, 12, 12))
    if what == "constraint":
        constrain_norms(model, (4, 12, 12), bound=0.1)
    for _ in range(12):
        if what == "constraint":
            model(torch.rand(1, 4, 12, 12))
            norm = constrained_layers(model)[0][0].tracking.norm
        else:
            norm = penalty.norms()["0"].item()
        assert 0.98 * truth.lower < norm <= truth.upper * (1 + 1e-5)


def test_a_default_device_changes_nothing() -> None:
    model = constrain_norms(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), (2, 12, 12), bound=0.1)
    x = torch.rand(1, 2, 12, 12)
    with torch.device("meta"):
        for _ in range(8):
            model(x)
    assert constrained_layers(model)[0][0].tracking.waves is not None
