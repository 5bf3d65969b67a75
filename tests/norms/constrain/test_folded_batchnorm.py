"""Layers under a norm constraint together with the BatchNorm behind them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fastlip
from fastlip.norms import constrain_norms, layer_norms, unconstrain
from fastlip.norms._constrain.constraint import FoldedConstraint
from fastlip.norms._constrain.whole_model import constrained_layers

SHAPE = (3, 8, 8)


def network(dtype: torch.dtype = torch.float32, positive: bool = False) -> nn.Sequential:
    """Layers of all kinds before a BatchNorm, and one before none, with factors that differ.

    Of positive weights and factors the first singular value lies apart.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 2, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.BatchNorm1d(16),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 4.0)
                module.running_var.uniform_(0.5, 2.0)
                if not positive:
                    module.weight[0] *= -1.0
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.mul_(3.0)
                if positive:
                    module.weight.abs_()
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(16, *SHAPE, dtype=dtype), torch.randint(5, (16,))


def train(model: nn.Module, steps: int) -> None:
    x, y = images()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()


@pytest.mark.parametrize("bound", [0.3, 1.0, 5.0])
def test_the_folded_norms_are_below_the_bound_after_training(bound: float) -> None:
    model = constrain_norms(network(), SHAPE, bound=bound, fold_batchnorm=True)
    held = [type(constraint) for constraint, _ in constrained_layers(model)]
    assert held.count(FoldedConstraint) == 4
    assert len(held) == 5
    for steps in (0, 20):
        train(model.train(), steps)
        report = layer_norms(model.eval(), SHAPE)
        assert len(report) == 5  # the BatchNorms are folded into their layers
        for interval in report.values():
            assert interval.lower <= bound
            assert interval.upper <= bound * (1 + 1e-6)
        assert max(interval.lower for interval in report.values()) >= 0.98 * bound
    whole = fastlip.lipschitz_bound(model, SHAPE).upper
    assert whole <= bound**5 * (1 + 1e-5)
    x = images()[0]
    shift = 1e-2 * torch.randn_like(x)
    with torch.no_grad():
        stretch = (model(x + shift) - model(x)).flatten(1).norm(dim=1) / shift.flatten(1).norm(dim=1)
    assert stretch.max() <= whole


def test_without_folding_a_batchnorm_undoes_the_constraint() -> None:
    """What the option is for: the statistics follow the scaled weight, and the factors make up for it."""
    loose, held = network(), network()
    constrain_norms(loose, SHAPE, bound=0.1)
    constrain_norms(held, SHAPE, bound=0.1, fold_batchnorm=True)
    for model in (loose, held):
        train(model, 40)
    assert layer_norms(loose.eval(), SHAPE)["0"].lower > 0.5
    assert layer_norms(held.eval(), SHAPE)["0"].lower <= 0.1


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_what_is_computed(training: bool) -> None:
    model = network(torch.float64, positive=True)
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.0  # the differences below must not move the statistics
    constrain_norms(model, SHAPE, fold_batchnorm=True, iterations=20, rtol=1e-8, method="svd").train(training)
    x, y = images(torch.float64)
    parameters = [p for p in model.parameters() if p.dim() > 1] + [held for _, held in constrained_layers(model)]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = F.normalize(torch.randn_like(parameter).flatten(), dim=0).view_as(parameter)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                parameter.add_(step * direction)
                for constraint, _ in constrained_layers(model):
                    constraint.tracking.interval = 1
                ends.append(F.cross_entropy(model(x), y).item())
                parameter.sub_(step * direction)
        slope, size = (ends[0] - ends[1]) / 2e-5, gradient.norm().item()
        assert size > 0.0
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-4 * size)


def test_removal_copies_and_checkpoints() -> None:
    model = constrain_norms(network(), SHAPE, fold_batchnorm=True)
    train(model, 5)
    x = images()[0]
    with torch.no_grad():
        expected = model.eval()(x)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), expected)
        twin[0].weight.mul_(100.0)  # its own layer's weight, which the copy's constraint reads
        assert all(interval.lower <= 1.0 for interval in layer_norms(twin, SHAPE).values())
        torch.testing.assert_close(model(x), expected)
        loaded = constrain_norms(network(), SHAPE, fold_batchnorm=True).eval()
        loaded.load_state_dict(model.state_dict())
        torch.testing.assert_close(loaded(x), expected)
        plain = unconstrain(model)
        torch.testing.assert_close(plain(x), expected)
    assert set(plain.state_dict()) == set(network().state_dict())
    assert not parametrize.is_parametrized(plain[1])


def test_compiled_whole() -> None:
    model = constrain_norms(network(positive=True), SHAPE, bound=0.5, fold_batchnorm=True, iterations=20)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = images()[0]
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    pairs = zip(compiled.parameters(), model.parameters(), strict=True)
    for other, own in pairs:
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-3, atol=1e-3 * float(own.grad.abs().max()) + 1e-6)


class Shared(nn.Module):
    """One BatchNorm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x))))


def test_what_cannot_be_folded_is_refused() -> None:
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match=r"layer 0 cannot be constrained: .*no weight to scale \(affine=False\)"):
        constrain_norms(without, SHAPE, fold_batchnorm=True)
    with pytest.raises(ValueError, match=r"layer first cannot be constrained: .*behind other layers too"):
        constrain_norms(Shared(), SHAPE, fold_batchnorm=True)
    taken = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parametrize.register_parametrization(taken[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight of the BatchNorm behind it is parametrised already"):
        constrain_norms(taken, SHAPE, fold_batchnorm=True)
    constrain_norms(without, SHAPE)  # alone the layer can be
    functional = Functional()
    with pytest.raises(ValueError, match=r"layer conv cannot be constrained: .* not that of a BatchNorm module"):
        constrain_norms(functional, SHAPE, fold_batchnorm=True)
    constrain_norms(functional, SHAPE)


class Functional(nn.Module):
    """A batch norm by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.variance)


@pytest.mark.parametrize("factor", [0.0, 1e-20, 1.0])
def test_gradients_are_finite_where_factors_vanish(factor: float) -> None:
    """As where the last BatchNorm of a residual block starts from 0; compiled code reads no norm."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.mul_(factor)
    constrain_norms(model, (3,), fold_batchnorm=True)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)
    torch.compile(twin, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    model(x).square().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_fewer_bits_is_certified_again(dtype: torch.dtype) -> None:
    for _ in range(12):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=0.0))
        with torch.no_grad():
            model[0].weight.uniform_(1.0, 2.0)
            model[1].weight.uniform_(2.0, 3.0)
        model.to(dtype).float()  # weights that the cast below does not change
        constrain_norms(model, (1,), fold_batchnorm=True).eval()
        model(torch.ones(1, 1))
        model.to(dtype)
        model(torch.ones(1, 1, dtype=dtype))
        norm = (model[0].weight.double() * model[1].weight.double() / model[1].running_var.double().sqrt()).item()
        assert 0.96 <= norm <= 1.0


def test_a_weight_that_hooks_compute_is_refused() -> None:
    model = constrain_norms(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (3,), fold_batchnorm=True)
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="layer 0: its weight is no parameter any more"):
        model.eval()(torch.ones(2, 3))


def test_a_layer_that_was_replaced_is_refused() -> None:
    model = constrain_norms(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (3,), fold_batchnorm=True)
    x, former = torch.rand(5, 3), model[0]
    copied = copy.deepcopy(model)
    model[0] = nn.Linear(3, 4)
    for mode in (model.train(), model.eval()):
        with pytest.raises(ValueError, match="layer 0: it was replaced after its constraint"):
            mode(x)
    model[0] = former
    assert model(x).shape == copied.eval()(x).shape == (5, 4)
    model[0] = nn.Linear(3, 4)
    assert unconstrain(model)(x).shape == (5, 4)


def test_a_part_alone_can_be_unconstrained() -> None:
    tail = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    constrain_norms(nn.Sequential(nn.Linear(3, 4), tail), (3,), fold_batchnorm=True)
    unconstrain(tail)
    assert not parametrize.is_parametrized(tail[0])
