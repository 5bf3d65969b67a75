"""The differentiable norm and the parametrisation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlip.norms import constrain_norm, conv_norm, spectral_norm_value


@pytest.mark.parametrize(
    ("groups", "kwargs"),
    [
        (1, {"padding": 1}),
        (2, {"stride": 2, "padding": 2}),
        (1, {"dilation": 2, "padding": 1, "padding_mode": "reflect"}),
    ],
)
def test_value_and_gradient_agree_with_the_matrix(groups: int, kwargs: dict) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    value = spectral_norm_value(weight, 6, groups=groups, rtol=1e-9, **kwargs)
    (gradient,) = torch.autograd.grad(value, weight)
    pad = kwargs.get("padding", 0)
    units = torch.eye(144, dtype=torch.float64).reshape(144, 4, 6, 6)
    padded = F.pad(units, (pad,) * 4, mode="reflect" if "padding_mode" in kwargs else "constant")
    out = F.conv2d(padded, weight, None, kwargs.get("stride", 1), 0, kwargs.get("dilation", 1), groups)
    norm = torch.linalg.svdvals(out.flatten(1))[0]
    (expected,) = torch.autograd.grad(norm, weight)
    assert value.item() == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
def test_value_is_as_accurate_as_asked_from_any_start(rtol: float) -> None:
    """Some starts hardly hold the leading singular vector, and later steps must not be content with the others."""
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    norm = conv_norm(weight, 5, padding=1, method="svd").upper
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        value = spectral_norm_value(weight, 5, padding=1, rtol=rtol, generator=generator)
        assert value.item() == pytest.approx(norm, rel=rtol)


def test_value_of_zero_is_zero_with_a_gradient() -> None:
    weight = torch.zeros(2, 2, 3, 3, requires_grad=True)
    value = spectral_norm_value(weight, 5)
    value.backward()
    assert value.item() == 0.0
    assert weight.grad is not None


@pytest.mark.parametrize("scale", [1e-40, 1e-37, 1e-30, 1e-25, 1e-18, 1.0, 1e15, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_value_and_gradient_at_any_magnitude(scale: float, mode: str) -> None:
    base = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = (base * scale).requires_grad_()
    truth = conv_norm(weight, 6, padding=1, padding_mode=mode).upper
    value = spectral_norm_value(weight, 6, padding=1, padding_mode=mode)
    value.backward()
    assert weight.grad is not None
    assert value.item() == pytest.approx(truth, rel=1e-2)
    # <gradient, W> is the norm for any of its subgradients.
    assert (weight.grad.double() * weight.detach().double()).sum().item() == pytest.approx(truth, rel=1e-2)


def test_value_of_taps_that_never_meet_the_input_is_zero_with_a_gradient() -> None:
    weight = torch.full((2, 2, 2, 2), 3e38, requires_grad=True)
    value = spectral_norm_value(weight, 10, padding=20, dilation=40)
    value.backward()
    assert value.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_value_of_what_padding_cancels() -> None:
    weight = torch.tensor([[[1.0, -1.0]]], requires_grad=True)
    value = spectral_norm_value(weight, 1, padding=1, padding_mode="replicate")
    value.backward()
    assert value.item() == 0.0
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e12, 1e25, 1e30])
def test_constraint_at_any_magnitude(scale: float) -> None:
    torch.manual_seed(4)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.mul_(scale)
    constrain_norm(conv, 6, bound=0.5 * scale, iterations=3)
    for _ in range(60):
        weight = conv.weight  # in training mode, where each look at it takes steps
    norm = conv_norm(weight, 6, padding=1).upper
    assert norm == pytest.approx(0.5 * scale, rel=1e-2)
    conv.weight.sum().backward()
    assert conv.parametrizations.weight.original.grad.isfinite().all()
    assert conv_norm(conv.eval().weight, 6, padding=1).lower <= 0.5 * scale


def test_value_settings_are_checked() -> None:
    weight = torch.ones(2, 2, 3, 3)
    with pytest.raises(ValueError, match="max_steps must be"):
        spectral_norm_value(weight, 8, max_steps=0)
    with pytest.raises(ValueError, match="rtol must be"):
        spectral_norm_value(weight, 8, rtol=0.0)
    with pytest.raises(TypeError, match="generator must be"):
        spectral_norm_value(weight, 8, generator=0)  # type: ignore[arg-type]  # what is refused


def test_value_dtype_is_checked() -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        spectral_norm_value(torch.ones(1, 1, 3, 3).half(), 5)


@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_constrained_convolution_learns_and_keeps_its_bound(bound: float) -> None:
    torch.manual_seed(1)
    conv = constrain_norm(nn.Conv2d(3, 4, 3, padding=1), 8, bound=bound, iterations=2)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    x = torch.randn(16, 3, 8, 8)
    target = F.conv2d(x, torch.randn(4, 3, 3, 3), padding=1)  # a map of norm far above either bound
    losses = []
    for _ in range(30):
        loss = F.mse_loss(conv(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    conv.eval()
    interval = conv_norm(conv.weight, 8, padding=1, rtol=1e-6)
    assert interval.lower <= bound
    # The map to learn is above the bound, so that the bound is what binds.
    assert interval.upper >= 0.98 * bound


def test_constraint_leaves_small_weights_alone_and_follows_changes() -> None:
    torch.manual_seed(2)
    linear = nn.Linear(5, 3).eval()
    with torch.no_grad():
        linear.weight.mul_(1e-3)
    before = linear.weight.clone()
    constrain_norm(linear, bound=1.0)
    torch.testing.assert_close(linear.weight, before)
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(1e6)
    assert torch.linalg.matrix_norm(linear.weight.double(), 2).item() <= 1.0 + 1e-6


def test_constrained_transposed_convolution_and_state_dict() -> None:
    torch.manual_seed(3)
    conv = constrain_norm(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), 4, bound=0.25)
    for _ in range(50):
        conv(torch.randn(1, 3, 4, 4))
    other = constrain_norm(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), 4, bound=0.25)
    other.load_state_dict(conv.state_dict())
    units = torch.eye(48).reshape(48, 3, 4, 4)
    for module in (conv.eval(), other.eval(), copy.deepcopy(conv)):
        with torch.no_grad():
            matrix = (module(units) - module(torch.zeros_like(units))).flatten(1)
        norm = torch.linalg.matrix_norm(matrix.double(), 2).item()
        assert 0.24 <= norm <= 0.25 * (1 + 1e-5)


def test_a_constrained_layer_may_start_at_zero() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    nn.init.zeros_(layer.weight)
    constrain_norm(layer, 6, bound=0.5)
    x = torch.randn(2, 2, 6, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(x) - 3.0 * x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    layer.eval()
    upper = conv_norm(layer.weight, 6, padding=1).upper
    assert 0.4 < upper <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("spoilt", [0.0, float("nan"), float("inf")])
def test_a_constraint_recovers_from_weights_that_have_no_norm(spoilt: float) -> None:
    layer = constrain_norm(nn.Linear(4, 3, bias=False), bound=0.5)
    original = layer.parametrizations.weight.original
    good = original.detach().clone() * 10.0
    with torch.no_grad():
        original.fill_(spoilt)
        layer(torch.ones(1, 4))
        original.copy_(good)
        for _ in range(50):
            layer(torch.ones(1, 4))
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(0.5, rel=1e-3)
    with torch.no_grad():
        original.fill_(float("nan"))
    with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        layer.eval()(torch.ones(1, 4))


def test_constraint_errors() -> None:
    with pytest.raises(ValueError, match="bound must be positive"):
        constrain_norm(nn.Linear(2, 2), bound=0.0)
    with pytest.raises(ValueError, match="input_size must have 2 axes"):
        constrain_norm(nn.Conv2d(1, 1, 1), (3,))
    with pytest.raises(ValueError, match="iterations must be"):
        constrain_norm(nn.Linear(2, 2), iterations=0)
    with pytest.raises(TypeError, match="Conv, ConvTranspose or Linear"):
        constrain_norm(nn.PReLU())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_the_gradient_of_a_constraint_is_that_of_what_it_computes(kind: str, training: bool) -> None:
    torch.manual_seed(4)
    made = {
        "linear": lambda: constrain_norm(nn.Linear(6, 5, bias=False).double(), iterations=300, rtol=1e-8),
        "conv": lambda: constrain_norm(
            nn.Conv2d(2, 3, 3, padding=1, bias=False).double(), 5, iterations=300, rtol=1e-8, method="svd"
        ),
        "transposed": lambda: constrain_norm(
            nn.ConvTranspose2d(2, 3, 3, bias=False).double(), 4, iterations=300, rtol=1e-8, method="svd"
        ),
    }
    layer = made[kind]().train(training)
    x = torch.randn(3, *{"linear": (6,), "conv": (2, 5, 5), "transposed": (2, 4, 4)}[kind], dtype=torch.float64)
    original = layer.parametrizations.weight.original
    original.data.abs_().mul_(8.0)  # positive, so that the first singular value lies apart from the others
    target = torch.randn_like(layer(x))
    loss = lambda: ((layer(x) - target) ** 2).sum()  # noqa: E731
    (grad,) = torch.autograd.grad(loss(), original)
    direction = torch.randn_like(original)
    direction /= direction.norm()
    with torch.no_grad():
        ends = []
        for step in (1e-5, -1e-5):
            original.add_(step * direction)
            ends.append(loss().item())
            original.sub_(step * direction)
    slope = (grad * direction).sum().item()
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)
    # A weight above the bound is scaled to it, so that its own length makes no difference.
    assert (grad * original).sum().item() == pytest.approx(0.0, abs=1e-6 * grad.norm().item() * original.norm().item())


def test_a_constraint_warns_once_of_another_input_size() -> None:
    layer = constrain_norm(nn.Conv2d(1, 1, 3, padding=1), (5, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(2, 1, 5, 6))
        layer(torch.ones(1, 5, 6))
        constrain_norm(nn.Linear(3, 3))(torch.ones(4, 7, 3))
    with pytest.warns(UserWarning, match=r"constrained on inputs of size \[5, 6\], but is used on \[6, 5\]"):
        layer(torch.ones(2, 1, 6, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(2, 1, 6, 5))
