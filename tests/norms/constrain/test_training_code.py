"""What training code does with constrained layers beside calling the model and stepping."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fastlip import layer_norms, lipschitz_bound
from fastlip.norms import constrain_norm, constrain_norms, conv_norm, spectral_penalty, unconstrain
from fastlip.norms._constrain.constraint import NormConstraint

SHAPE = (4, 6, 6)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5, bias=False)
    )


def enlarged(model: nn.Module, times: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(times)
    return model


def norm_of(weight: Tensor) -> float:
    return conv_norm(weight.detach(), 6, padding=1, rtol=1e-4).upper


def constraints(model: nn.Module) -> Iterator[NormConstraint]:
    return (module for module in model.modules() if isinstance(module, NormConstraint))


def alone(layer: nn.Conv2d) -> nn.Module:
    return constrain_norm(layer, 6)


def in_a_model(layer: nn.Conv2d) -> nn.Module:
    return constrain_norms(nn.Sequential(layer), SHAPE)


@pytest.mark.parametrize("constrained", [alone, in_a_model])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_whatever_part_of_a_weight_grows_is_scaled(groups: int, constrained: Callable[[nn.Conv2d], nn.Module]) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=groups)
    enlarged(layer, 2.0)
    model = constrained(layer)
    x, original = torch.rand(2, *SHAPE), layer.parametrizations.weight.original
    for _ in range(100):  # until vectors stand still
        model(x)
    for taken in range(120):
        with torch.no_grad():
            original[2:] *= 1.03 if taken < 60 else 1.0
        model(x)
    assert conv_norm(layer.weight.detach(), 6, padding=1, groups=groups, rtol=1e-4).lower <= 1.01
    assert conv_norm(original.detach(), 6, padding=1, groups=groups).lower > 3.0


class Interrupting(nn.Module):
    """An interrupt from the keyboard in the middle of the forward."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        if self.on:
            raise KeyboardInterrupt
        return x


def interrupted(training: bool) -> tuple[nn.Sequential, Tensor]:
    stop = Interrupting()
    layers = network()
    model = nn.Sequential(layers[0], stop, *layers[1:])
    enlarged(model, 10.0)
    constrain_norms(model, SHAPE)
    x = torch.rand(2, *SHAPE)
    model(x)
    model.eval()(x)
    stop.on = True
    with pytest.raises(KeyboardInterrupt):
        model.train(training)(x)
    stop.on = False
    return model, x


def test_an_interrupt_in_training_leaves_eval_mode_certified() -> None:
    model, _ = interrupted(training=True)
    for constraint in constraints(model):
        constraint.tracking.certificate = None
    for own in (model, copy.deepcopy(model)):
        assert norm_of(own.eval()[0].weight) <= 1.0


def test_an_interrupt_in_eval_mode_is_no_reason_to_trust_an_old_certificate() -> None:
    model, x = interrupted(training=False)
    enlarged(model, 100.0)
    assert norm_of(model[0].weight) <= 1.0
    shrunk = model[0](x)
    assert shrunk.norm() <= x.norm()


def test_after_an_interrupt_layers_that_are_called_alone_take_steps() -> None:
    model, x = interrupted(training=True)
    original = model[0].parametrizations.weight.original
    for _ in range(40):
        with torch.no_grad():
            original += 0.3 * torch.randn_like(original)
        model[0](x)
    assert norm_of(model[0].weight) <= 1.05
    assert norm_of(original) > 5.0


def test_every_call_keeps_its_own_options() -> None:
    model = network()
    loose = constrain_norms(copy.deepcopy(model), SHAPE, bound=0.1, layers=["3"], rtol=0.5, confidence=0.5)
    both = constrain_norms(copy.deepcopy(model), SHAPE, bound=0.1, layers=["0"], rtol=0.5, confidence=0.5)
    constrain_norms(both, SHAPE, bound=0.1, layers=["3"], rtol=1e-4)
    both.eval()(torch.rand(1, *SHAPE))
    loose.eval()(torch.rand(1, *SHAPE))
    certificate = both[3].parametrizations.weight[0].tracking.certificate
    truth = torch.linalg.matrix_norm(model[3].weight, 2).item()
    assert truth <= certificate.upper <= truth * 1.001
    assert both[3].parametrizations.weight[0].options.confidence > 0.5
    # Neither does a second call take steps of its own.
    assert len(both._forward_pre_hooks) == len(both._forward_hooks) == 1


def test_a_generator_makes_training_reproducible() -> None:
    def trained(constrain: Callable[[torch.Generator], nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        model = constrain(torch.Generator().manual_seed(1))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimiser.zero_grad()
            model(torch.rand(2, *SHAPE)).square().sum().backward()
            optimiser.step()
        return list(model.parameters())

    def penalised(generator: torch.Generator) -> nn.Module:
        model = network()
        spectral_penalty(model, SHAPE, bound=0.1, generator=generator)().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        return model

    for constrain in (
        lambda g: constrain_norm(nn.Conv2d(4, 4, 3, padding=1), 6, bound=0.1, generator=g),
        lambda g: constrain_norms(network(), SHAPE, bound=0.1, generator=g),
        penalised,
    ):
        assert all(torch.equal(a, b) for a, b in zip(trained(constrain), trained(constrain), strict=True))


@pytest.mark.parametrize("size", [10, 300])
def test_weights_that_become_subnormal_stay_below_the_bound(size: int) -> None:
    layer = nn.Linear(size, size, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    constrain_norm(layer, bound=1e-4).eval()
    with torch.no_grad():
        assert torch.linalg.matrix_norm(layer.weight.double(), 2) <= 1e-4
    layer = constrain_norm(nn.Linear(300, 300).half(), bound=1e-6).eval()
    with pytest.raises(ValueError, match=r"layer Linear: no weight in torch.float16 is small enough"):
        layer(torch.ones(1, 300).half())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("constrained", [alone, in_a_model])
def test_a_checkpoint_computes_the_same_again(constrained: Callable[[nn.Conv2d], nn.Module], reentrant: bool) -> None:
    """The norm crosses the bound, where a step in the backward pass would make another graph."""
    model = constrained(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    (constraint,) = constraints(model)
    (original,) = model.parameters()
    for _ in range(20):
        with torch.no_grad():
            original.mul_(0.999 / norm_of(original) * (1.0 + 0.002 * torch.rand(())))
            original += 1e-3 * torch.randn_like(original)
        x = torch.rand(2, *SHAPE, requires_grad=True)
        kept = copy.deepcopy(model)
        out = checkpoint(model, x, use_reentrant=reentrant)
        vectors = constraint.v.clone()
        out.square().sum().backward()
        assert torch.equal(constraint.v, vectors)
        kept(x).square().sum().backward()
        torch.testing.assert_close(original.grad, next(kept.parameters()).grad)
        original.grad = None


@pytest.mark.parametrize("gain", [0.1, 5.0])
@pytest.mark.parametrize("fold", [False, True])
def test_eval_mode_compiled_whole(fold: bool, gain: float) -> None:
    """Certified again where weights have changed; copies have certificates of their own."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    constrain_norms(enlarged(model, gain), SHAPE, bound=0.7, fold_batchnorm=fold, rtol=1e-6).eval()
    x, other = torch.rand(3, *SHAPE), copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for times in (1.0, 3.0):
        enlarged(model, times)
        enlarged(other, times)
        found, expected = compiled(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for own, out in ((model, expected), (other, found)):
            own.zero_grad()
            out.square().sum().backward()
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    norms = layer_norms(other, SHAPE, fold_batchnorm=fold)
    assert all(norms[name].lower <= 0.7 for name in ("0", "4"))
    enlarged(model, 100.0)  # is nothing to the copy
    torch.testing.assert_close(compiled(x), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_transforms_of_torch_func(training: bool, fold: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    model[1].track_running_stats = model[1].training = False
    model = constrain_norms(enlarged(model, 3.0), SHAPE, bound=0.5, fold_batchnorm=fold, iterations=20).train(training)
    model[1].eval()
    x = torch.rand(3, *SHAPE)
    for _ in range(3):
        model(x)  # at a place where steps change no more than a little
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (images,)).square().sum()

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    found = torch.func.grad(loss)(parameters, x)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())
    of_inputs = torch.func.vmap(torch.func.grad(lambda image: model(image[None]).sum()))(x)
    wanted = x.clone().requires_grad_()
    model(wanted).sum().backward()
    torch.testing.assert_close(of_inputs, wanted.grad, rtol=1e-2, atol=1e-4)
    assert torch.func.jacrev(model)(x).shape == (3, 5, 3, *SHAPE)
    layer_norms(unconstrain(model).eval(), SHAPE)


class Penalised(nn.Module):
    """A penalty as a function of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.penalty = spectral_penalty(nn.Sequential(self.conv), (2, 12, 12), bound=0.1)

    def forward(self) -> Tensor:
        found: Tensor = self.penalty()
        return found


def test_penalties_under_the_transforms_of_torch_func() -> None:
    model = Penalised()
    values = {name: p.detach() for name, p in model.named_parameters()}

    def penalty(given: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, given, ())
        return found

    for _ in range(10):  # some of which look for waves that overtake
        values = {name: v + 0.05 * torch.randn_like(v) for name, v in values.items()}
        gradient = torch.func.grad(penalty)(values)["conv.weight"]
        norm = norm_of_12(values["conv.weight"])
        along = (gradient * values["conv.weight"]).sum().item() / (2 * (norm - 0.1) * norm)
        assert 0.7 < along < 1.001  # norms are tracked from below
    several = {name: torch.stack([v, v]) for name, v in values.items()}
    with pytest.raises(ValueError, match="cannot take several weights at once"):
        torch.func.vmap(penalty)(several)


def norm_of_12(weight: Tensor) -> float:
    return conv_norm(weight, 12, padding=1, rtol=1e-4).upper


def test_a_penalty_is_compiled_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(432, 2))
    penalty, x = spectral_penalty(model, (2, 12, 12), bound=0.1), torch.rand(2, 2, 12, 12)
    compiled = torch.compile(lambda x: model(x).square().mean() + penalty(), backend="aot_eager", fullgraph=True)
    for _ in range(12):
        compiled(x).backward()
    expected = model(x).square().mean() + penalty()
    assert compiled(x).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_several_models_at_once_are_refused_by_name(training: bool) -> None:
    models = [constrain_norms(network(), SHAPE).train(training) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.rand(1, *SHAPE)
    together = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))
    with pytest.raises(ValueError, match=r"layer 0 is constrained, and cannot take several weights at once"):
        together(parameters, buffers)


def test_second_derivatives_in_the_weights_are_refused() -> None:
    model = constrain_norms(enlarged(network(), 5.0), SHAPE)
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(torch.rand(2, *SHAPE)).square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(gradient.square().sum() for gradient in first).backward()


def test_what_is_constrained_in_inference_mode_can_be_trained() -> None:
    model, layer = network(), nn.Conv2d(4, 4, 3, padding=1)
    with torch.inference_mode():
        constrain_norms(model, SHAPE)
        constrain_norm(layer, 6)
    model(torch.rand(2, *SHAPE)).sum().backward()
    layer(torch.rand(2, *SHAPE)).sum().backward()
    assert all(parameter.grad is not None for parameter in (*model.parameters(), *layer.parameters()))


@pytest.mark.parametrize("constrained", [alone, in_a_model])
def test_a_weight_that_is_assigned_is_scaled(constrained: Callable[[nn.Conv2d], nn.Module]) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model = constrained(layer)
    new = torch.randn_like(layer.weight)
    layer.weight = new
    assert torch.equal(layer.parametrizations.weight.original, new)
    model.eval()(torch.rand(1, *SHAPE))
    assert norm_of(layer.weight) <= 1.0 < norm_of(new)


def test_weights_that_are_no_parameters_are_refused_by_name() -> None:
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=1)
    with pytest.raises(ValueError, match="the Linear's weight is no parameter of its own"):
        constrain_norm(pruned)
    with pytest.raises(ValueError, match="weight is parametrised already"):
        constrain_norm(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"its weight is no parameter of its own; ``layers`` may leave it out"):
        constrain_norms(nn.Sequential(pruned), (4,))
    spoilt = nn.Linear(4, 4)
    with torch.no_grad():
        spoilt.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        constrain_norm(spoilt)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_export_is_refused_whatever_the_mode(training: bool, strict: bool) -> None:
    """A program would go by the constraints of whatever process it is loaded in."""
    model = constrain_norms(network(), SHAPE, bound=0.5).train(training)
    x = torch.rand(2, *SHAPE)
    with pytest.raises(Exception, match="unconstrain"):
        torch.export.export(model, (x,), strict=strict)
    plain = unconstrain(copy.deepcopy(model)).eval()
    program = torch.export.export(plain, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model.eval()(x), atol=1e-5, rtol=1e-5)


class Unpacked(nn.Module):
    """A model that torch.fx cannot trace, and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        (wide,) = [self.first(x)]
        if isinstance(x, torch.fx.Proxy):
            raise TypeError("not by torch.fx")
        return self.last(wide.relu())


def test_bounds_of_constrained_models_that_are_exported_for_them() -> None:
    model = constrain_norms(Unpacked(), (8,), bound=0.5).eval()
    bound = lipschitz_bound(model, (8,)).upper
    assert bound <= 0.25 * (1 + 1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], torch.rand(8))
    assert torch.linalg.matrix_norm(jacobian, 2) <= bound


def test_compiled_code_says_so_where_its_model_is_gone() -> None:
    weight = torch.rand(3, 3)
    with pytest.raises(RuntimeError, match="is not in this process any more"):
        torch.ops.fastlip.certified_scales([weight], [weight], [-1])
    with pytest.raises(RuntimeError, match="is not in this process any more"):
        torch.ops.fastlip.certified_gradient(weight, weight, -1)


@pytest.mark.parametrize(
    ("name", "value"), [("stride", (1, 1)), ("padding", (0, 1)), ("dilation", (2, 2)), ("padding_mode", "circular")]
)
def test_a_layer_whose_map_is_another_one_is_refused_in_eval_mode(name: str, value: object) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1))
    constrain_norms(model, SHAPE, bound=0.5).eval()
    x = torch.rand(1, *SHAPE)
    model(x)
    setattr(model[1], name, value)
    with pytest.raises(ValueError, match=rf"layer 1 is constrained with {name} .*now has .*call unconstrain"):
        model(x)
    with pytest.warns(UserWarning, match=f"1 is constrained with {name}"):
        model.train()(x)
    alone = constrain_norm(nn.Conv2d(4, 4, 3, stride=2, padding=1), 6).eval()
    alone(x)
    setattr(alone, name, value)
    with pytest.warns(UserWarning, match=f"Conv2d is constrained with {name}"):
        alone(x)


def test_a_replaced_layer_is_told_of() -> None:
    model = network()
    penalty = spectral_penalty(model, SHAPE, bound=0.1)
    assert penalty() > 0
    model[3] = nn.Linear(216, 3)
    with pytest.raises(ValueError, match="layer 3: it was replaced after its penalty"):
        penalty()
    model = constrain_norms(network(), SHAPE, bound=0.1).eval()
    x = torch.rand(1, *SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        copy.deepcopy(model)(x)
    model[3] = nn.Linear(216, 3)
    with pytest.warns(UserWarning, match="1 of 2 layers that were constrained together no longer are"):
        model(x)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_a_model_is_copied_after_transforms_in_eval_mode(transform: str) -> None:
    """What they wrap must not outlive them."""
    model = constrain_norms(network(), SHAPE, bound=0.1).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (x[None],)).square().sum()

    x = torch.rand(3, *SHAPE)
    if transform == "grad":
        found = torch.func.grad(loss)(parameters, x[0])
    else:
        found = {name: g[0] for name, g in torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).items()}
    made = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    torch.testing.assert_close(made(x), model(x))
    torch.testing.assert_close(average(x), model(x))
    model(x[:1]).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


class ReadsWeights(nn.Module):
    """Weights that are read outside of their layers' forward, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, self.first.weight, self.first.bias).relu())


@pytest.mark.parametrize(
    ("make", "shape"),
    [(ReadsWeights, (8,)), (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (4, 8))],
)
def test_layer_norms_of_weights_that_are_read_outside_of_their_layers(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = make().eval()
    plain = layer_norms(model, shape)
    constrain_norms(model, shape, bound=0.5, layers=lambda name, module: "self_attn" not in name).eval()
    report = layer_norms(model, shape, strict=not plain.left_out)
    assert report.keys() == plain.keys()
    assert report.left_out == plain.left_out
    assert (report.log10_product_upper is None) == (plain.log10_product_upper is None)
    assert all(report[name].upper <= 0.5 * (1 + 1e-3) for name in report if "self_attn" not in name)


def test_weights_from_a_model_constrained_on_inputs_of_another_size() -> None:
    def pooled() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    given = constrain_norms(pooled(), SHAPE, bound=0.5)
    taken = constrain_norms(pooled(), (4, 9, 7), bound=0.5)
    state = given.state_dict()
    before = {name: t.clone() for name, t in state.items()}
    assert taken.load_state_dict(state) == ([], [])
    assert all(torch.equal(t, before[name]) for name, t in state.items())
    assert torch.equal(taken[0].parametrizations.weight.original, given[0].parametrizations.weight.original)
    assert taken[0].parametrizations.weight[0].v.shape == (2, 4, 9, 7)
    report = layer_norms(taken.eval(), (4, 9, 7))
    assert all(interval.upper <= 0.5 * (1 + 1e-3) for interval in report.values())


def test_empty_layers_and_models_without_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of empty tensors
        empty, model = nn.Linear(3, 0), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0))
    with pytest.raises(ValueError, match="weight must not be empty"):
        constrain_norm(empty)
    assert set(spectral_penalty(model, (4,)).norms()) == {"0"}
    assert lipschitz_bound(model, (4,)).upper == 0.0
    assert constrain_norms(model, (4,))(torch.rand(2, 4)).shape == (2, 0)
    for function in (constrain_norms, spectral_penalty, layer_norms, lipschitz_bound):
        with pytest.raises(ValueError, match=r"on the meta device, where 0\.weight has no numbers"):
            function(nn.Sequential(nn.Linear(4, 3, device="meta")), (4,))
