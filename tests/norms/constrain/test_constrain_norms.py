"""All layers of a model under a norm constraint."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastlip
from fastlip.norms import constrain_norm, constrain_norms, layer_norms, unconstrain
from fastlip.norms._constrain.whole_model import constrained_layers

SHAPE = (3, 8, 8)


def small_network(dtype: torch.dtype = torch.float32, positive: bool = False) -> nn.Sequential:
    """Convolutions of all kinds, with norms well above 1; of positive weights the first singular value lies apart."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(256, 5),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            if positive:
                parameter.abs_()
    return model.to(dtype)


def images(count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(count, *SHAPE, dtype=dtype), torch.randint(5, (count,))


def train(model: nn.Module, steps: int, rate: float = 0.05) -> None:
    x, y = images(16)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()


def tracked(model: nn.Module) -> dict[str, float]:
    return {constraint.name: constraint.tracking.norm for constraint, _ in constrained_layers(model)}


def test_after_training_every_layer_is_below_the_bound_and_the_network_below_their_product() -> None:
    model = constrain_norms(small_network(), SHAPE, bound=0.8)
    train(model, 20)
    report = layer_norms(model.eval(), SHAPE)
    assert list(report) == ["0", "2", "4", "6", "8", "10"]
    for interval in report.values():
        assert interval.lower <= 0.8
        assert interval.upper <= 0.8 * (1 + 1e-6)
        assert interval.lower >= 0.8 * 0.98  # the bound is what holds these weights down
    bound = fastlip.lipschitz_bound(model, SHAPE).upper
    assert bound <= 0.8**6 * (1 + 1e-5)
    x = images(8)[0]
    found = fastlip.attacks.pgd(model, x, model(x).argmax(1), norm="l2", eps=0.5, steps=10, bounds=(-9, 9), keep="last")
    with torch.no_grad():
        stretch = (model(found) - model(x)).norm(dim=1) / (found - x).flatten(1).norm(dim=1)
    jacobians = fastlip.lipschitz.local_lipschitz(model, x)
    assert 0 < stretch.min().item()
    assert max(stretch.max().item(), jacobians.max().item()) <= bound * (1 + 1e-5)


def test_the_tracked_norms_follow_the_certified_ones() -> None:
    model = constrain_norms(small_network(), SHAPE)
    for _ in range(3):
        train(model, 8, rate=0.02)
        model(images()[0])
        with torch.no_grad():
            pairs = constrained_layers(model)
            truth = {c.name: fastlip.norms.operator_norms([c.operator(w)])[0].upper for c, w in pairs}
        for name, norm in tracked(model).items():
            assert 0.98 * truth[name] <= norm <= truth[name] * (1 + 1e-5), name


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_what_is_computed(training: bool) -> None:
    model = constrain_norms(
        small_network(torch.float64, positive=True), SHAPE, iterations=40, rtol=1e-8, method="svd"
    ).train(training)
    x, y = images(3, torch.float64)
    pairs = constrained_layers(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), [weight for _, weight in pairs])
    for (constraint, weight), gradient in zip(pairs, gradients, strict=True):
        direction = F.normalize(torch.randn_like(weight).flatten(), dim=0).view_as(weight)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                weight.add_(step * direction)
                constraint.tracking.interval = 1
                ends.append(F.cross_entropy(model(x), y).item())
                weight.sub_(step * direction)
        slope, size = (ends[0] - ends[1]) / 2e-5, gradient.norm().item()
        assert size > 0.0
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-4 * size)
        # A weight above the bound is scaled to it, so that its own length makes no difference.
        along = (gradient * weight).sum().item()
        assert along == pytest.approx(0.0, abs=1e-6 * size * weight.norm().item())


def test_a_run_equals_one_that_constrains_layer_by_layer() -> None:
    together = small_network(torch.float64, positive=True)
    apart = copy.deepcopy(together)
    constrain_norms(together, SHAPE, iterations=30)
    for place, size in {0: 8, 2: 8, 4: 4, 6: 4, 8: 8, 10: ()}.items():
        constrain_norm(apart[place], size, iterations=30)
    x, y = images(8, torch.float64)
    for model in (together, apart):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(4):
            for constraint, _ in constrained_layers(model):
                constraint.tracking.interval = 1
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(together(x), apart(x), rtol=1e-3, atol=1e-3)


def test_small_weights_are_left_alone() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    model = constrain_norms(nn.Sequential(layer), (4,))
    x = torch.rand(2, 4)
    expected = F.linear(x, layer.parametrizations.weight.original, layer.bias)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, x.sum(0).expand(3, 4))
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_every_dtype(dtype: torch.dtype) -> None:
    model = constrain_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 5)), SHAPE)
    model.to(dtype)
    x = torch.rand(2, *SHAPE, dtype=dtype)
    with torch.no_grad():
        for _, weight in constrained_layers(model):
            weight.mul_(8.0)
    model(x).float().sum().backward()
    for _, weight in constrained_layers(model):
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        assert weight.grad.isfinite().all()
    with torch.no_grad():
        model.eval()(x)
        for interval in layer_norms(model, SHAPE).values():
            assert interval.lower <= 1.0


def test_a_wider_dtype_keeps_what_eval_mode_has_certified() -> None:
    model = constrain_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 40)), SHAPE)
    with torch.no_grad():
        for _, weight in constrained_layers(model):
            weight.mul_(8.0)
    x = torch.rand(2, *SHAPE)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model.eval().to(dtype).zero_grad()
        model(x.to(dtype)).square().sum().backward()
        gradients.append([weight.grad for _, weight in constrained_layers(model)])
    for narrow, wide in zip(*gradients, strict=True):
        assert wide is not None
        assert wide.dtype == torch.float64
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-4 * wide.abs().max().item(), check_dtype=False)


@pytest.mark.parametrize("shape", [(50, 1), (1, 50), (500, 1)])
def test_matrices_of_rank_one_are_scaled_to_their_norm(shape: tuple[int, int]) -> None:
    """They have no second singular vector."""
    model = constrain_norms(nn.Sequential(nn.Linear(*shape)), shape[:1])
    (layer,) = model
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(30.0)
    for _ in range(40):
        constraint, weight = constrained_layers(model)[0]
        with torch.no_grad():
            weight.add_(0.05 * weight.norm() * F.normalize(torch.randn(1, weight.numel())).view_as(weight))
        model(torch.randn(8, shape[0])).sum().backward()
        assert constraint.tracking.norm == pytest.approx(weight.norm().item(), rel=1e-2)


def test_two_forwards_before_their_backwards() -> None:
    model = constrain_norms(small_network(), SHAPE)
    (x, _), (z, _) = images(), images()
    weight = model[0].parametrizations.weight.original
    apart = sum(torch.autograd.grad(model(t).square().sum(), weight)[0] for t in (x, z))
    first, second = model(x).square().sum(), model(z).square().sum()
    (both,) = torch.autograd.grad(first + second, weight)
    torch.testing.assert_close(both, apart, rtol=1e-3, atol=1e-3 * float(both.abs().max()))


def test_a_layer_that_is_called_without_the_model_takes_its_own_steps() -> None:
    model = constrain_norms(small_network(), SHAPE)
    layer = model[0]
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.rand(8, 3, 3, 3) * 5)
        for _ in range(30):
            layer(torch.rand(1, *SHAPE))
        assert fastlip.conv_norm(layer.weight, 8, padding=1).upper == pytest.approx(1.0, rel=1e-2)


def test_a_forward_that_fails_leaves_the_next_one_right() -> None:
    class Fails(nn.Module):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.armed:
                raise RuntimeError("midway")
            return x

    fails = Fails()
    model = constrain_norms(nn.Sequential(nn.Linear(6, 6), fails, nn.Linear(6, 6)), (6,), bound=0.1)
    fails.armed = True
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(RuntimeError, match="midway"):
            model(torch.ones(1, 6))
    fails.armed = False
    with torch.no_grad():
        for _, weight in constrained_layers(model):
            weight.mul_(100.0)
        model(torch.ones(1, 6))
        assert max(torch.linalg.matrix_norm(model[i].weight, 2).item() for i in (0, 2)) <= 0.1 * (1 + 1e-6)


def test_checkpoints_copies_and_removal() -> None:
    model = constrain_norms(small_network(), SHAPE)
    train(model, 3)
    x = images()[0]
    other = constrain_norms(small_network(), SHAPE)
    other(x)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-4)
        out = model.eval()(x)
        duplicate = copy.deepcopy(model)
        assert torch.equal(other.eval()(x), out)
        assert torch.equal(duplicate(x), out)
        parameter = duplicate[0].parametrizations.weight.original
        assert unconstrain(duplicate) is duplicate
        assert torch.equal(duplicate(x), out)
        assert torch.equal(model(x), out)  # which shared classes with the copy
    assert duplicate[0].weight is parameter
    assert set(duplicate.state_dict()) == set(small_network().state_dict())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in duplicate.modules())
    small_network().load_state_dict(duplicate.state_dict())


def test_removal_takes_certified_weights_in_training_mode_too() -> None:
    model = nn.Sequential(constrain_norm(nn.Conv2d(3, 4, 3), 8), nn.Flatten(), nn.Linear(144, 4, bias=False))
    constrain_norms(model, SHAPE, layers=["2"])
    with torch.no_grad():
        for name in ("0", "2"):
            model.get_parameter(f"{name}.parametrizations.weight.original").copy_(
                torch.randn_like(model.get_submodule(name).weight)
            )
    unconstrain(model)
    assert all(interval.lower <= 1.0 for interval in layer_norms(model, SHAPE).values())
    assert isinstance(model[0].weight, nn.Parameter)


def test_an_averaged_copy_is_below_the_bound() -> None:
    model = constrain_norms(small_network(), SHAPE)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(model, 1)
        averaged.update_parameters(model)
    with torch.no_grad():
        averaged.eval()(images()[0])
    assert all(i.lower <= 1.0 for i in layer_norms(averaged.module, SHAPE).values())


def test_layers_that_share_a_weight() -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
    second.weight = first.weight
    with torch.no_grad():
        first.weight.mul_(5.0)
    model = constrain_norms(nn.Sequential(first, second), SHAPE)
    assert len(list(model.parameters())) == 3
    model(images()[0]).sum().backward()
    intervals = layer_norms(model.eval(), SHAPE)
    assert all(0.98 <= i.lower <= 1.0 for i in intervals.values())
    with torch.no_grad():
        out = model(images()[0][:1] * 0 + 0.5)
        torch.testing.assert_close(unconstrain(model)(torch.full((1, *SHAPE), 0.5)), out)
    assert first.weight is not second.weight


def test_a_model_of_which_a_part_is_in_eval_mode() -> None:
    model = constrain_norms(small_network(), SHAPE)
    model[0].eval()
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(10.0)
    model(images()[0]).sum().backward()
    assert fastlip.conv_norm(model[0].weight, 8, padding=1).lower <= 1.0


def test_autocast_does_not_coarsen_the_norm() -> None:
    model = constrain_norms(small_network(positive=True), SHAPE, iterations=30)
    x = images()[0]
    model(x)
    expected = tracked(model)
    for constraint, _ in constrained_layers(model):
        constraint.tracking.interval = 1
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().sum()
    loss.backward()
    for name, norm in tracked(model).items():
        assert norm == pytest.approx(expected[name], rel=1e-4)


def test_gradient_accumulation_gives_the_gradient_of_the_sum() -> None:
    model = constrain_norms(small_network(), SHAPE)
    x, y = images(8)
    weight = model[2].parametrizations.weight.original
    F.cross_entropy(model(x), y, reduction="sum").backward()
    whole = weight.grad.clone()
    model.zero_grad()
    for part, labels in zip(x.chunk(4), y.chunk(4), strict=True):
        F.cross_entropy(model(part), labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("choice", [["0", "10"], lambda name, module: isinstance(module, nn.Linear)])
def test_layers_are_chosen(choice: list[str] | Callable[[str, nn.Module], bool]) -> None:
    model = constrain_norms(small_network(), SHAPE, layers=choice)
    assert [c.name for c, _ in constrained_layers(model)] == (["10"] if callable(choice) else ["0", "10"])


class TwoSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(self.conv(x), 2))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def test_what_cannot_be_constrained_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer conv cannot be constrained: it is used on inputs of several sizes"):
        constrain_norms(TwoSizes(), SHAPE)
    assert not constrained_layers(constrain_norms(TwoSizes(), SHAPE, layers=[]))
    with pytest.raises(ValueError, match="layer unused does not run on inputs of shape"):
        constrain_norms(TwoSizes(), SHAPE, layers=["unused"])
    with pytest.raises(ValueError, match="layer 0 cannot be constrained: its weight is used as another map"):
        constrain_norms(nn.Sequential(Standardised(3, 4, 3, padding=1)), SHAPE)
    with pytest.raises(ValueError, match="layer 0 cannot be constrained: its weight is parametrised already"):
        constrain_norms(nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))), (3,))
    with pytest.raises(ValueError, match="layer 0 cannot be constrained: its weight is parametrised already"):
        constrain_norms(constrain_norms(nn.Sequential(nn.Linear(3, 3)), (3,)), (3,))
    spoilt = nn.Sequential(nn.Linear(3, 3))
    nn.init.constant_(spoilt[0].weight, float("nan"))
    with pytest.raises(ValueError, match="layer 0: weight holds NaN"):
        constrain_norms(spoilt, (3,))
    assert not constrained_layers(spoilt)


def test_arguments_are_checked() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="bound must be positive"):
        constrain_norms(model, (3,), bound=0.0)
    with pytest.raises(ValueError, match="iterations must be"):
        constrain_norms(model, (3,), iterations=0)
    with pytest.raises(TypeError, match="layers must be names"):
        constrain_norms(model, (3,), layers="0")
    with pytest.raises(ValueError, match="layers must be names of Conv"):
        constrain_norms(model, (3,), layers=["1"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'tol'"):
        constrain_norms(model, (3,), tol=1.0)  # type: ignore[call-arg]  # what is refused
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        constrain_norms(3, (3,))  # type: ignore[arg-type]  # what is refused


def test_another_size_warns_in_training_and_is_refused_in_eval_mode() -> None:
    model = constrain_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2, stride=2)), SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(2, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"constrained on inputs of size \[8, 8\], but is used on \[9, 9\]"):
        model(torch.rand(2, 3, 9, 9))
    model.eval()(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"layer 0 is constrained on inputs of size \[8, 8\]"):
        model(torch.rand(2, 3, 9, 9))


def test_weights_without_a_norm_are_refused_in_eval_mode_and_pass_in_training() -> None:
    model = constrain_norms(nn.Sequential(nn.Linear(4, 3)), (4,), bound=0.5)
    original = model[0].parametrizations.weight.original
    good = original.detach().abs() * 10
    with torch.no_grad():
        original.fill_(float("nan"))
        model(torch.ones(1, 4))
        with pytest.raises(ValueError, match="layer 0: weight holds NaN"):
            model.eval()(torch.ones(1, 4))
        original.copy_(good)
        model.train()
        for _ in range(40):
            model(torch.ones(1, 4))
        assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(0.5, rel=1e-2)
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    zero = constrain_norms(nn.Sequential(layer), (4,), bound=0.5)
    zero(torch.ones(1, 4)).sum().backward()
    assert layer.parametrizations.weight.original.grad.eq(1.0).all()


def test_a_parametrisation_on_top_is_refused_by_name() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    model = constrain_norms(nn.Sequential(nn.Linear(4, 3)), (4,))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    with pytest.raises(ValueError, match="layer 0: its weight was parametrised once more"):
        model.eval()(torch.ones(1, 4))
    with pytest.raises(ValueError, match="layer 0: its weight was parametrised once more"):
        unconstrain(model)


def applied_norm(model: nn.Sequential) -> float:
    """Of a first layer that is linear, without a bias, in training mode."""
    return torch.linalg.matrix_norm(model(torch.eye(model[0].in_features)), 2).item()


@pytest.mark.parametrize("begin", [0.0, 1e-3, 3.0])
def test_another_weight_is_followed_at_once(begin: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    weight = model[0].weight
    with torch.no_grad():
        weight.mul_(begin)
    constrain_norms(model, (6,))
    for _ in range(64):
        applied_norm(model)  # the vectors rest at last
    for factor in (30.0, -30.0):
        with torch.no_grad():
            weight.copy_(factor * torch.randn(6, 6))
            assert applied_norm(model) <= 1.05


def test_vectors_take_steps_soon_after_the_norm_has_moved_and_then_rest_as_before() -> None:
    model = constrain_norms(nn.Sequential(nn.Linear(40, 40, bias=False)), (40,))
    ((constraint, weight),) = constrained_layers(model)
    tracking = constraint.tracking
    for _ in range(256):
        applied_norm(model)
    rest, norm = tracking.interval, tracking.found
    assert rest >= 4
    with torch.no_grad():
        weight.mul_(1.01)
    applied_norm(model)  # goes by the norm of the new weight
    assert tracking.norm == pytest.approx(1.01 * norm, rel=1e-5)
    applied_norm(model)
    assert tracking.found == pytest.approx(1.01 * norm, rel=1e-5)
    assert rest // 2 <= tracking.interval <= rest


def test_vectors_take_steps_in_every_forward_after_the_norm_has_leapt() -> None:
    """A weight that is replaced may have any singular vectors, of which the old ones know little."""
    model = constrain_norms(nn.Sequential(nn.Linear(40, 40, bias=False)), (40,))
    ((constraint, weight),) = constrained_layers(model)
    for _ in range(1100):
        applied_norm(model)
    assert constraint.tracking.interval >= 32
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(weight)
        s[0] *= 1.02
        s[20] = 1.03 * s[0]  # and passes by
        weight.copy_(u * s @ vh)
    over = [applied_norm(model) for _ in range(12)]
    assert over[0] > 1.02
    assert over[-1] < 1.005


def test_a_vector_that_the_new_weight_takes_to_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    weight = model[0].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[3.0, 0.0]]))
    constrain_norms(model, (2,))
    for _ in range(5):
        model(torch.eye(2))
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.0, 3.0]]))
    assert applied_norm(model) == pytest.approx(1.0, rel=1e-3)
    model.eval()(torch.eye(2)).sum().backward()
    assert weight.grad.isfinite().all()


def test_training_goes_on_after_inference_mode() -> None:
    model = constrain_norms(small_network(), SHAPE)
    x, y = images()
    train(model, 30)
    with torch.inference_mode():
        for _ in range(20):
            model(x)
    F.cross_entropy(model(x), y).backward()
    for _, weight in constrained_layers(model):
        assert weight.grad.isfinite().all()
        assert weight.grad.any()


def test_removal_leaves_a_tied_layer_as_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            nn.init.constant_(self.first.weight, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = constrain_norms(Tied(), (4,), layers=["first"]).eval()
    x = torch.rand(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(unconstrain(model)(x), model(x))
        assert torch.equal(model.second.weight, torch.full((4, 4), 2.0))
        assert model.first.weight.norm() <= 1.0


def test_a_model_that_is_wrapped_already_is_refused() -> None:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match="before it is wrapped in DistributedDataParallel"):
        constrain_norms(wrapped, SHAPE)
