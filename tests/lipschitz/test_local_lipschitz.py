"""Jacobian norms at data against explicit Jacobians."""

import pytest
import torch
from torch import nn

from fastlip.lipschitz import lipschitz_bound, local_lipschitz


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def test_norms_are_those_of_the_jacobians() -> None:
    model = small_network().double().train()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    norms = local_lipschitz(model, x, rtol=1e-10, max_steps=500)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    for sample, norm in zip(x, norms.tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(model, sample[None]).reshape(5, 72)
        assert norm == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-5)


def random_network() -> tuple[nn.Module, torch.Tensor]:
    """A small network of either kind, and samples."""
    if torch.rand(()) < 0.5:
        channels = int(torch.randint(2, 6, ()))
        layers = nn.Conv2d(2, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 3, 3, stride=2), nn.Flatten()
        return nn.Sequential(*layers), torch.randn(8, 2, 7, 7)
    inputs, hidden, outputs = torch.randint(1, 12, (3,)).tolist()
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)), torch.randn(8, inputs)


def test_norms_are_nearly_those_of_the_jacobians_from_any_start() -> None:
    """A start close to another singular vector grows little in each step of power iteration, which then ends early."""
    shares = []
    for _ in range(12):
        model, x = random_network()
        jacobians = [torch.autograd.functional.jacobian(model, row[None]).view(-1, row.numel()) for row in x]
        expected = torch.linalg.matrix_norm(torch.stack(jacobians).double(), 2)
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        shares.append(torch.stack([local_lipschitz(model, x, generator=g) for g in generators]) / expected)
    found = torch.cat(shares, 1)
    assert found.max() <= 1.0 + 1e-5
    assert (found > 0.998).double().mean() > 0.97


def test_norms_are_below_the_certified_bound() -> None:
    model = small_network()
    norms = local_lipschitz(model, torch.randn(64, 2, 6, 6))
    assert norms.dtype == torch.float64
    assert norms.max().item() <= lipschitz_bound(model, (2, 6, 6)).upper * (1 + 1e-6)
    assert norms.min().item() > 0.0


def test_generator_and_constant_models() -> None:
    model = small_network()
    x = torch.randn(3, 2, 6, 6)
    runs = [local_lipschitz(model, x, max_steps=2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    flat = nn.Sequential(nn.Linear(3, 3), nn.Hardtanh(100.0, 101.0))
    assert torch.equal(local_lipschitz(flat, torch.randn(2, 3)), torch.zeros(2, dtype=torch.float64))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_has_a_norm(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Attention().requires_grad_(not frozen)
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    (norm,) = local_lipschitz(model, x, rtol=1e-10, max_steps=500).tolist()
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(18, 18)
    assert norm == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_norms_under_inference_mode() -> None:
    model = small_network()
    with torch.inference_mode():
        x = torch.randn(2, 2, 6, 6)
        norms = local_lipschitz(model, x, rtol=1e-6, max_steps=500)
    assert torch.allclose(norms, local_lipschitz(model, x.clone(), rtol=1e-6, max_steps=500), rtol=1e-3)


class OddPReLU(nn.Module):
    """prelu(x) - prelu(-x), which is (1 + slope) x."""

    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU(init=0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prelu(x) - self.prelu(-x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_that_disagree_are_refused(dtype: torch.dtype) -> None:
    model = OddPReLU().to(dtype)
    x = torch.tensor([[1.0], [-1.0]], dtype=dtype)
    assert local_lipschitz(model, x).tolist() == [1.25, 1.25]
    with pytest.raises(ValueError, match=r"disagree at sample 1: .* move these inputs"):
        local_lipschitz(model, torch.tensor([[1.0], [0.0], [2.0]], dtype=dtype))
    with pytest.raises(ValueError, match=r"disagree at samples 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.:"):
        local_lipschitz(model, torch.zeros(9, 1, dtype=dtype))


def test_disagreement_in_the_last_step_is_refused() -> None:
    with pytest.raises(ValueError, match="disagree at sample 0"):
        local_lipschitz(OddPReLU(), torch.zeros(1, 3), max_steps=1)


def test_derivatives_that_are_no_numbers_are_refused() -> None:
    x = torch.rand(3, 1, 4, 4) + 0.5
    model = nn.LPPool2d(2, 2)
    assert local_lipschitz(model, x).tolist() == pytest.approx([1.0] * 3, rel=1e-5)
    x[2, 0, :2, :2] = 0.0
    with pytest.raises(ValueError, match="not finite at sample 2"):
        local_lipschitz(model, x)


def test_exact_zeros_of_relu_have_a_norm() -> None:
    # Zero inputs and no biases: every ReLU sits at its kink, where both derivatives are 0.
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(3, 1, 6, 6)
    x[1] = 0.0
    x[2, 0, :3] = 0.0
    norms = local_lipschitz(model, x, rtol=1e-7, max_steps=500)
    assert norms[1].item() == 0.0
    for row in (0, 2):
        jacobian = torch.autograd.functional.jacobian(model, x[row, None]).reshape(2, 36)
        assert norms[row].item() == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-3)


@pytest.mark.parametrize("gain", [16.0, 18.0, 20.0, 24.0])
def test_rounding_is_no_disagreement(gain: float) -> None:
    # J v of a saturated softmax, and of a normalisation over two values, is a difference of nearly equal numbers.
    torch.manual_seed(0)
    x = torch.randn(64, 40)
    linear = nn.Linear(40, 5)
    with torch.no_grad():
        linear.weight.mul_(gain)
    for last in (nn.Softmax(1), nn.Sequential(nn.Linear(5, 2), nn.LayerNorm(2), nn.Linear(2, 3))):
        assert local_lipschitz(nn.Sequential(linear, last), x).isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="x must be a floating-point batch"):
        local_lipschitz(nn.Linear(3, 3), torch.randn(3))
    with pytest.raises(ValueError, match="row per sample"):
        local_lipschitz(nn.Flatten(0), torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        local_lipschitz(lambda x: x, torch.randn(2, 3))  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="TorchScript"):
        local_lipschitz(torch.jit.trace(nn.ReLU(), torch.randn(2, 3)), torch.randn(2, 3))


class OldSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


class NewSwish(torch.autograd.Function):
    generate_vmap_rule = True
    backward = OldSwish.backward

    @staticmethod
    def forward(x):
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class OnceSwish(OldSwish):
    backward = staticmethod(torch.autograd.function.once_differentiable(OldSwish.backward))


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x)


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0][:, -1]


@pytest.mark.parametrize("kind", [OldSwish, NewSwish, LastOfLSTM])
def test_models_without_forward_derivatives(kind: type) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), LastOfLSTM() if kind is LastOfLSTM else Applied(kind)).double().eval()
    x = torch.randn(4, *((5, 3) if kind is LastOfLSTM else (3,)), dtype=torch.float64)
    norms = local_lipschitz(model, x, rtol=1e-10, max_steps=500)
    for sample, norm in zip(x, norms.tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], sample).flatten(1)
        assert norm == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-5)


def test_a_module_without_either_derivative_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Applied(OnceSwish)))
    with pytest.raises(ValueError, match=r"1\.0 \(Applied\) has no forward-mode derivative, and its backward pass"):
        local_lipschitz(model, torch.randn(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class UsedOnce(torch.autograd.Function):
    """x^2, whose backward pass drops what it needs."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.x = inputs[0].detach()
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        x, ctx.x = ctx.x, None
        return 2 * x * grad

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


def test_a_backward_pass_that_works_once_is_enough() -> None:
    x = torch.randn(3, 4)
    assert torch.allclose(local_lipschitz(Applied(UsedOnce), x), 2 * x.abs().amax(1).double(), rtol=1e-3)


def test_hooks_of_a_backward_pass_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x, generator = torch.randn(2, 4), torch.Generator()
    before = local_lipschitz(model, x, generator=generator.manual_seed(0))
    model[1].register_full_backward_hook(lambda module, grads, given: (grads[0].clamp(min=0),))
    assert torch.equal(local_lipschitz(model, x, generator=generator.manual_seed(0)), before)


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.sin(x).clone()


def test_derivatives_that_are_lost_are_refused() -> None:
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        local_lipschitz(Detached(), torch.randn(2, 3))


def test_samples_without_elements() -> None:
    assert local_lipschitz(nn.Flatten(), torch.randn(2, 3, 0)).tolist() == [0.0, 0.0]
    assert local_lipschitz(nn.ReLU(), torch.randn(0, 3)).shape == (0,)


def test_a_sample_does_not_depend_on_others() -> None:
    """Each ends by itself, though some need more steps."""
    model, x = small_network().double(), torch.randn(6, 2, 6, 6, dtype=torch.float64)
    other = torch.cat([x[:3], torch.randn(3, 2, 6, 6, dtype=torch.float64)])
    norms = [local_lipschitz(model, t, generator=torch.Generator().manual_seed(0))[:3] for t in (x, other)]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0.0)
