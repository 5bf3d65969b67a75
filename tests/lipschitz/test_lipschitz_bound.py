"""lipschitz_bound against the largest stretch found on small networks, and against bounds computed by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlip
from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._bound import _largest_distance


def largest_stretch(model: nn.Module, shape: tuple[int, ...], points: int = 16, steps: int = 30) -> float:
    """Largest Jacobian norm found by climbing ||J v|| in both the point and the direction, in float64."""
    model = model.double().eval()
    x = torch.randn(points, *shape, dtype=torch.float64)
    v = torch.randn_like(x)
    axes = tuple(range(1, x.dim()))
    best = 0.0
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)
        move = 1e-5 * v
        with torch.no_grad():
            stretch = torch.linalg.vector_norm((model(x + move) - model(x - move)).flatten(1), dim=1) / 2e-5
        best = max(best, stretch.max().item())
        x = x.detach().requires_grad_()
        out, tangent = torch.func.jvp(model, (x,), (v,))
        energy = tangent.flatten(1).square().sum()
        (slope,) = torch.autograd.grad(energy, x, retain_graph=True, allow_unused=True)
        (v,) = torch.autograd.grad(out, x, tangent.detach())
        v = v.detach() + 1e-12
        if slope is not None:
            x = x.detach() + 0.3 * slope / (1e-12 + torch.linalg.vector_norm(slope, dim=axes, keepdim=True))
    return best


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2.0)
                module.weight.normal_()
    return model


class Block(nn.Module):
    """Residual block with a projection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += x if self.skip is None else self.skip(x)
        return torch.relu(out)


class Dense(nn.Module):
    """Two dense layers, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.b = nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.tanh(self.a(x))], 1)
        return torch.cat((x, F.silu(self.b(x))), dim=1).mean((2, 3))


class Normalised(nn.Module):
    """Input normalisation written out, then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.25, 2.0]).reshape(3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std).view(x.size(0), -1)


class Told(nn.Module):
    """A transposed convolution that is called with the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, 2, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(x, output_size=[8, 8]))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    resnet = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Block(4, 4, 1),
        Block(4, 6, 2),
    )
    return {
        "linear": (nn.Linear(6, 4), (6,)),
        "mlp": (nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 3)), (6,)),
        "resnet": (nn.Sequential(resnet, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), (3, 8, 8)),
        "vgg": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(2.0), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(7),
                nn.Flatten(), nn.Dropout(), nn.Linear(196, 3),
            ),
            (2, 6, 6),
        ),
        "preactivation": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2)), (3, 7, 7)),
        "dense": (Dense(), (2, 5, 5)),
        "normalised": (Normalised(), (3, 5, 5)),
        "transposed": (nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), nn.BatchNorm2d(3), nn.ELU(2.0)), (2, 4, 4)),
        "told": (Told(), (2, 4, 4)),
        "wide": (WideNet(), (3, 8, 8)),
        "one-dimensional": (nn.Sequential(nn.Conv1d(2, 3, 4), nn.SELU(), nn.AvgPool1d(3, 2, 1)), (2, 12)),
        "three-dimensional": (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Softplus(), nn.MaxPool3d(2, 1)), (1, 4, 4, 4)),
    }  # fmt: skip


NAMES = [
    "linear", "mlp", "resnet", "vgg", "preactivation", "dense", "normalised", "transposed", "wide", "one-dimensional",
    "three-dimensional",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bound_is_above_the_largest_stretch_found(name: str) -> None:
    model, shape = networks()[name]
    bound = lipschitz_bound(randomise(model), shape)
    stretch = largest_stretch(model, shape)
    # Differences in float64 are good to about nine digits.
    assert stretch <= bound.upper * (1 + 1e-8)
    # A bound further off on networks this small has lost its way.
    assert bound.upper <= 300 * stretch


@pytest.mark.parametrize("name", ["linear", "normalised", "told"])
def test_bound_of_an_affine_network_is_its_norm(name: str) -> None:
    model, shape = networks()[name]
    model = model.double().eval()
    jacobian = torch.autograd.functional.jacobian(model, torch.zeros(1, *shape, dtype=torch.float64))
    truth = torch.linalg.matrix_norm(jacobian.reshape(-1, math.prod(shape)), 2).item()
    bound = lipschitz_bound(model, shape)
    assert truth <= bound.upper * (1 + 1e-12)
    assert bound.upper == pytest.approx(truth, rel=1e-6)
    assert bound.confidence == 1.0
    assert bound.seed is None


def test_batchnorm_is_folded_before_the_norm() -> None:
    torch.manual_seed(2)
    conv, bn = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
    model = randomise(nn.Sequential(conv, bn)).double().eval()
    jacobian = torch.autograd.functional.jacobian(model, torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    truth = torch.linalg.matrix_norm(jacobian.reshape(-1, 108), 2).item()
    bound = lipschitz_bound(model, (3, 6, 6)).upper
    assert bound == pytest.approx(truth, rel=1e-6)
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs().max().item()
    assert bound < fastlip.conv_norm(conv.weight, 6, padding=1).upper * scale


def test_batchnorm_of_a_shared_convolution_output_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return torch.relu(self.bn(x)) + x

    torch.manual_seed(3)
    model = randomise(Shared())
    conv = torch.linalg.matrix_norm(model.conv.weight.double().flatten(1), 2).item()
    scale = (model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()).abs().max().item()
    bound = lipschitz_bound(model, (2, 3, 3), tight_chains=False)
    assert bound.upper == pytest.approx(conv * (1 + scale), rel=1e-6)


def test_sums_and_concatenations() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x + x - 2 * x, x / 3], 1) + 1.0

    assert lipschitz_bound(Sum(), (4,)).upper == pytest.approx(math.hypot(4.0, 1 / 3))


def test_parts_add_up_and_show_the_branches() -> None:
    model, shape = networks()["resnet"]
    bound = lipschitz_bound(randomise(model), shape, confidence=0.99, tight_chains=False)
    assert sum(part.log10_factor for part in bound.parts) == pytest.approx(bound.log10_upper)
    sums = [part for part in bound.parts if part.kind == "sum"]
    assert len(sums) == 2
    for part in sums:
        branches = sum(10 ** sum(p.log10_factor for p in branch) for branch in part.branches)
        assert part.log10_factor <= math.log10(branches) + 1e-12
    assert [part.name for part in bound.parts][:2] == ["0.0", "0.3"]
    text = str(bound)
    assert "0.4.conv1" in text
    assert "branch" in text
    data = json.loads(json.dumps(bound.to_dict()))
    assert data["log10_upper"] == bound.log10_upper


def test_margin_is_the_largest_distance_of_two_rows() -> None:
    torch.manual_seed(4)
    last = nn.Linear(6, 5)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), last)
    first = torch.linalg.matrix_norm(model[0].weight.double(), 2).item()
    rows = last.weight.double()
    distance = max((a - b).norm().item() for a in rows for b in rows)
    bound = lipschitz_bound(model, (6,), tight_chains=False)
    assert 10**bound.log10_margin == pytest.approx(
        min(distance, math.sqrt(2) * 10 ** bound.parts[1].log10_factor) * first
    )
    tail = lipschitz_bound(nn.Sequential(model, nn.ReLU()), (6,))
    assert tail.log10_margin == pytest.approx(tail.log10_upper + math.log10(2) / 2)


@pytest.mark.parametrize("at_once", [1, 7, 50, 1 << 22])
def test_margins_of_many_classes_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("fastlip.lipschitz._bound._DISTANCES", at_once)
    for seed in range(20):
        torch.manual_seed(seed)
        rows = torch.randn(1 + seed, 3, dtype=torch.float64)
        distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").max().item()
        assert _largest_distance(rows) == pytest.approx(distance, rel=1e-12)
    far = torch.randn(80, 5, dtype=torch.float64) + 1e9  # all pairs are as far apart, up to rounding
    distance = torch.cdist(far, far, compute_mode="donot_use_mm_for_euclid_dist").max().item()
    assert _largest_distance(far) == pytest.approx(distance, rel=1e-12)
    alike = torch.ones(130, 3, dtype=torch.float64)  # more pairs than are computed twice
    alike[77, 1] += 1e-3
    assert 1e-3 <= _largest_distance(alike) * (1.0 + 1e-9) < 1e-3 + 1e-6


@pytest.mark.parametrize("exponent", [-300, -200, 200, 307])
def test_margins_of_rows_whose_squares_leave_the_range(exponent: int) -> None:
    torch.manual_seed(6)
    last = nn.Linear(5, 120).double()  # of more pairs than are computed twice
    rows = last.weight.detach().clone()
    with torch.no_grad():
        last.weight.mul_(10.0**exponent)
    distance = torch.cdist(rows, rows).max().item()
    bound = lipschitz_bound(last, (5,), check=False)
    assert math.log10(distance) - 1e-12 <= bound.log10_margin - exponent <= math.log10(distance) + 1e-6


def test_margins_of_rows_that_nearly_agree_do_not_suffer_from_cancellation() -> None:
    torch.manual_seed(5)
    last = nn.Linear(40, 6).double()
    with torch.no_grad():
        last.weight.copy_(1e3 + 1e-6 * torch.randn(6, 40))
    rows = last.weight
    distance = max((a - b).norm().item() for a in rows for b in rows)
    bound = lipschitz_bound(last, (40,), check=False)
    assert distance <= 10**bound.log10_margin == pytest.approx(distance, rel=1e-9)


class WideBlock(nn.Module):
    """Pre-activation block in the way of the usual WideResNet code, with shared activations and torch.add."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.equal = channels == out
        self.shortcut = None if self.equal else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        return torch.add(x if self.equal else self.shortcut(x), self.conv2(out))


class WideNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(WideBlock(4, 4, 1), WideBlock(4, 6, 2))
        self.bn, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.blocks(self.conv(x))))
        out = F.avg_pool2d(out, 4)
        return self.fc(out.view(-1, 6))


def test_deep_bounds_overflow_to_infinity_but_keep_their_logarithm() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1e10)
    bound = lipschitz_bound(nn.Sequential(*[layer] * 40), (1,))
    assert bound.upper == math.inf
    assert bound.log10_upper == pytest.approx(400.0)
    assert bound.log10_product == pytest.approx(400.0)


def test_a_zero_layer_makes_the_bound_zero() -> None:
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    bound = lipschitz_bound(nn.Sequential(nn.Linear(3, 3), layer), (3,))
    assert bound.upper == 0.0
    assert "0" in str(bound)


def test_wrappers_are_looked_through_and_other_things_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    truth = lipschitz_bound(model, (4,)).upper
    normalised = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    expected = lipschitz_bound(normalised, (4,)).upper
    assert lipschitz_bound(nn.SyncBatchNorm.convert_sync_batchnorm(normalised), (4,)).upper == expected
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        assert lipschitz_bound(wrapped, (4,)).upper == truth
    with torch.inference_mode():
        assert lipschitz_bound(model, (4,)).upper == truth
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        lipschitz_bound(lambda x: x, (4,))  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="TorchScript"):
        lipschitz_bound(torch.jit.trace(model, torch.zeros(1, 4)), (4,))
    with pytest.raises(ValueError, match="input_shape must be positive integers"):
        lipschitz_bound(model, 4)  # type: ignore[arg-type]  # what is refused


def test_arguments_with_defaults_keep_them() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: float | None = None, latent: bool = False, *, k: float = 2.0) -> Tensor:
            y = self.fc(x) if scale is None else scale * self.fc(x)
            return torch.cat([x, y], 1) if latent else k * y

    model = Optional()
    expected = 2 * lipschitz_bound(model.fc, (4,)).upper
    assert lipschitz_bound(model, (4,)).upper == pytest.approx(expected)


def test_confidence_is_joint_and_the_model_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).train()
    bound = lipschitz_bound(model, (4, 20, 20), confidence=0.9, generator=torch.Generator().manual_seed(11))
    assert bound.confidence == 0.9
    assert bound.seed == 11
    assert [part.norm.confidence for part in bound.parts] == pytest.approx([0.95, 0.95])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("depth", ["resnet18", "resnet50"])
def test_torchvision_resnets(depth: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = getattr(torchvision.models, depth)(num_classes=10)
    bound = lipschitz_bound(model, (3, 32, 32), rtol=0.1)
    names = [part.name for part in bound.parts]
    assert names[:2] == ["conv1", "maxpool"]
    assert names[-1] == "fc"
    assert 10 ** bound.parts[1].log10_factor == pytest.approx(2.0)
    assert bound.log10_upper < 30
