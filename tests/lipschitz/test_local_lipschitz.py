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


def test_errors() -> None:
    with pytest.raises(ValueError, match="x must be a floating-point batch"):
        local_lipschitz(nn.Linear(3, 3), torch.randn(3))
    with pytest.raises(ValueError, match="row per sample"):
        local_lipschitz(nn.Flatten(0), torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        local_lipschitz(lambda x: x, torch.randn(2, 3))  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="TorchScript"):
        local_lipschitz(torch.jit.trace(nn.ReLU(), torch.randn(2, 3)), torch.randn(2, 3))
