"""The faster copy: it differs by rounding, and what it claims is confirmed on the model itself."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import fx, nn

from fastlip import attacks, ops
from fastlip.attacks import _prepare, _rewrite
from fastlip.models import resnet50

CALL = {"eps": 0.065, "steps": 8, "loss": "ce"}
#: As users have it; see conftest.py.
LEAST = _prepare._LEAST_MULTIPLY_ADDS


@pytest.fixture(autouse=True)
def every_precision_is_fast(monkeypatch):
    """Copies in low precision are tested on every machine."""
    monkeypatch.setattr(_prepare, "precision_for", lambda precision, device: precision)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def traced(model):
    return fx.symbolic_trace(copy.deepcopy(model).requires_grad_(False))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


@pytest.fixture
def residual():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Block(8), nn.Flatten(), nn.Linear(800, 5))
        model.append(nn.BatchNorm1d(5))
        for _ in range(3):
            model(torch.rand(16, 3, 12, 12))
    return model.eval()


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [False, True])
def test_logits_differ_by_rounding(residual, precision, fast):
    inputs = torch.rand(9, 3, 12, 12, generator=gen())
    network = attacks.prepare(residual, inputs, fast=fast, precision=precision)
    assert torch.equal(network(inputs), residual(inputs))
    assert network.exact == (not fast and precision is None)
    spread = residual(inputs).std()
    tolerance = {None: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}[precision]
    assert (network.ascend(inputs) - residual(inputs)).abs().max() < tolerance * spread


def test_every_batch_norm_is_folded(residual):
    folded = traced(residual)
    _rewrite.fold(folded)
    folded.delete_all_unused_submodules()
    folded.recompile()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in residual.modules()) == 3
    torch.testing.assert_close(folded(torch.ones(2, 3, 12, 12)), residual(torch.ones(2, 3, 12, 12)))
    assert all(not p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in residual.parameters())


def test_shared_and_branching_layers_are_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return (self.first(y) + self.second(self.conv(y)) + y).flatten(1)

    model = Shared()
    model(torch.rand(8, 3, 4, 4))
    model.eval()
    inputs = torch.rand(4, 3, 4, 4)
    want = model(inputs)
    folded = traced(model)
    _rewrite.fold(folded)
    _rewrite.fuse(folded)
    folded.recompile()
    torch.testing.assert_close(folded(inputs), want)


def test_a_resnet50_on_small_images_and_its_gradients():
    """Maps of 8x8 down to one pixel: every way in which a convolution is computed."""
    pytest.importorskip("torchvision")
    model = resnet50(10, seed=0).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
    inputs = torch.rand(3, 3, 32, 32, generator=gen(), requires_grad=True)
    network = attacks.prepare(model, inputs.detach())
    assert not network.exact
    want, got = model(inputs), network.ascend(inputs)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(y.logsumexp(1).sum(), inputs)[0] for y in (got, want)]
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()  # a ReLU at 0 may be open in one of them alone


def test_a_copy_that_fails_only_backwards_is_not_to_be_had(residual):
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    inputs = torch.rand(4, 3, 12, 12, generator=gen())
    model = nn.Sequential(residual, nn.Identity())
    model[1].forward = OneWay.apply
    assert attacks.prepare(model, inputs, fast=True).exact


def test_in_place_modules_after_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh(inplace=True), nn.Conv2d(4, 2, 12), nn.Flatten()).eval()
    inputs = torch.rand(4, 3, 12, 12, generator=gen(), requires_grad=True)
    network = attacks.prepare(model, inputs.detach())
    assert not network.exact
    grads = [torch.autograd.grad(y.square().sum(), inputs)[0] for y in (network.ascend(inputs), model(inputs))]
    torch.testing.assert_close(*grads)


def test_the_first_layer_keeps_its_precision(residual):
    """A perturbation below bfloat16's resolution of the input must still reach the logits."""
    inputs = torch.full((1, 3, 12, 12), 0.75)
    network = attacks.prepare(residual, inputs, fast=True, precision=torch.bfloat16)
    moved = inputs + 1e-3
    assert torch.equal(moved.bfloat16(), inputs.bfloat16())
    assert not torch.equal(network.ascend(moved), network.ascend(inputs))


@pytest.mark.parametrize("options", [{"fast": True}, {"fast": True, "precision": torch.bfloat16}])
@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd, attacks.square])
def test_strength_and_feasibility_stay(cnn_problem, options, attack):
    model, inputs, labels = cnn_problem
    call = {"eps": 0.065, "generator": None} | ({"queries": 60} if attack is attacks.square else {"steps": 20})
    exact = attack(model, inputs, labels, **call | {"generator": gen()})
    found = attack(model, inputs, labels, **call | {"generator": gen()}, **options)
    assert ((found - inputs).abs() <= 0.065 + 1e-6).all()
    fell = [(model(x).argmax(1) != labels).sum().item() for x in (exact, found)]
    assert abs(fell[0] - fell[1]) <= 2


def test_successes_are_those_of_the_model(cnn_problem):
    """A copy that is wrong everywhere claims everything, and is believed nothing."""
    model, inputs, labels = cnn_problem
    claims = attacks.Network(model, lambda x: -model(x))
    found = attacks.pgd(claims, inputs, labels, eps=0.01, steps=3, random_start=False)
    assert (model(found).argmax(1) == labels).all()
    found = attacks.min_norm(claims, inputs, labels, method="search", search_steps=2, steps=2, eps_max=1e-4)
    assert not found.found.any()


def test_images_go_on_after_a_claim_that_was_refuted(cnn_problem):
    model, inputs, labels = cnn_problem
    calls = []

    def lies_once(x):
        calls.append(len(x))
        return -model(x) if len(calls) == 1 else model(x)

    network = attacks.Network(model, lies_once)
    found = attacks.pgd(network, inputs, labels, eps=0.3, steps=10, loss="margin", random_start=False)
    assert (model(found).argmax(1) != labels).all()
    assert calls[1] == 32


def test_claims_are_gathered_before_the_model_is_asked(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"eps": 0.065, "steps": 20, "step_size": 0.003, "loss": "ce", "random_start": False}
    judged = []

    def judge(x):
        judged.append(len(x))
        return model(x)

    found = attacks.pgd(attacks.Network(judge, model, 1e-6), inputs, labels, **call)
    fell = model(found).argmax(1) != labels
    assert torch.equal(fell, model(attacks.pgd(model, inputs, labels, **call)).argmax(1) != labels)
    assert sum(judged) == fell.sum() > 2 * len(judged)


def test_what_the_copy_misses_is_seen_at_the_end(cnn_problem):
    model, inputs, labels = cnn_problem
    blind = attacks.Network(model, lambda x: model(x) + 1e3 * nn.functional.one_hot(labels[: len(x)], 10))
    found = attacks.pgd(blind, inputs, labels, eps=0.3, steps=10, loss="margin", random_start=False)
    assert (model(found).argmax(1) != labels).all()


def test_prepared_once_serves_all(cnn_problem):
    model, inputs, labels = cnn_problem
    network = attacks.prepare(model, inputs, fast=True)
    once = attacks.pgd(network, inputs, labels, generator=gen(), **CALL)
    each = attacks.pgd(model, inputs, labels, generator=gen(), fast=True, **CALL)
    assert torch.equal(once, each)
    assert attacks.prepare(network, inputs) is network


def test_the_model_is_left_as_it_was(cnn_problem):
    model, inputs, labels = cnn_problem
    model.train()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attacks.pgd(model, inputs, labels, fast=True, precision=torch.bfloat16, generator=gen(), **CALL)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_models_without_a_faster_form_go_as_they_are(cnn_problem):
    model, inputs, _ = cnn_problem

    class Untraceable(nn.Module):
        def forward(self, x):
            return model(x) if float(x.sum()) > 0 else model(-x)

    class Random(nn.Module):
        def forward(self, x):
            return model(x) + torch.rand(len(x), 10)

    for odd in (Untraceable(), Random()):
        assert attacks.prepare(odd, inputs, fast=True).exact
    assert attacks.prepare(lambda x: model(x), inputs, fast=True).exact
    assert not attacks.prepare(lambda x: model(x), inputs, precision=torch.bfloat16).exact
    assert not attacks.prepare(Untraceable(), inputs, precision=torch.bfloat16).exact


@pytest.mark.parametrize(
    ("body", "copied"),
    [
        (lambda: [nn.Flatten(), nn.Linear(768, 400), nn.ReLU(), nn.Linear(400, 10)], False),
        (lambda: [nn.Conv2d(3, 4, 3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)], False),
        (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)], True),
        (lambda: [nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(784, 10)], False),
        (lambda: [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12544, 10)], True),
    ],
)
def test_networks_with_next_to_nothing_in_convolutions_have_no_copy(monkeypatch, body, copied):
    model, inputs = nn.Sequential(*body()).eval(), torch.rand(4, 3, 16, 16)
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", LEAST)
    assert _prepare.network_of(model, inputs, fast=True, precision=None).exact == (not copied)
    # What was asked for is made.
    assert not _prepare.network_of(model, inputs, fast=True, precision=torch.bfloat16).exact
    network = attacks.prepare(model, inputs, fast=True)
    assert not network.exact
    assert _prepare.network_of(network, inputs, fast=True, precision=None) is network


def test_multiply_adds_are_those_of_one_image():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), stride=2, groups=2), nn.Conv2d(6, 3, 1), nn.Flatten()).eval()
    # Maps of 7x6 pixels, of 2x3x5 products each for 6 channels, and of 6 for 3.
    expected = 7 * 6 * (6 * 2 * 15 + 3 * 6)
    for images in (1, 3):
        assert _prepare._multiply_adds(model, torch.rand(images, 4, 16, 16)) == expected

    class ForThree(nn.Module):
        def forward(self, x):
            return model(x.view(3, 4, 16, 16))

    assert _prepare._multiply_adds(ForThree(), torch.rand(3, 4, 16, 16)) == expected


def test_multiply_adds_are_counted_once_and_failures_do_not_last(cnn_problem, monkeypatch):
    model, inputs, _ = cnn_problem
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 1e12)
    counted = []
    multiply_adds = _prepare._multiply_adds
    monkeypatch.setattr(_prepare, "_multiply_adds", lambda *a: counted.append(multiply_adds(*a)) or counted[-1])

    def made():
        return _prepare.network_of(model, inputs, fast=True, precision=None)

    for _ in range(3):
        assert made().exact
    assert len(counted) == 1
    assert 0 < counted[0] < 1e12
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 0.0)
    with monkeypatch.context() as failing:
        failing.setattr(_prepare, "_traced", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
        assert made().exact
    assert not made().exact
    assert len(counted) == 1  # a step of training changes no shapes
    _prepare.network_of(model, inputs[..., :-1, :-1], fast=True, precision=None)
    assert len(counted) == 2


def test_what_cannot_be_counted_may_have_a_copy():
    class Refuses(nn.Module):
        def forward(self, x):
            raise RuntimeError

    assert _prepare._multiply_adds(Refuses(), torch.rand(2, 3)) == torch.inf


def test_counts_and_hooks_of_the_copy(cnn_problem):
    model, inputs, labels = cnn_problem
    with attacks.count_forward_backward(model) as counts:
        attacks.pgd(model, inputs, labels, eps=1e-5, steps=3, keep="last", fast=True, random_start=False)
    # 4 images are compared in preparation.
    assert counts.backward == 3 * 32
    assert counts.forward == 4 + 3 * 32
    with pytest.raises(TypeError, match=r"nn\.Module"), attacks.count_forward_backward(lambda x: x):
        pass


def test_copies_in_low_precision_see_few_batch_sizes(residual):
    assert [_prepare.padded_size(n) for n in (1, 2, 3, 5, 8, 9, 32, 33, 100)] == [1, 2, 4, 8, 8, 16, 32, 40, 112]
    sizes = []

    def small(x):
        sizes.append(len(x))
        return residual(x)

    few = _prepare._FewSizes(small)
    inputs = torch.rand(18, 3, 12, 12, generator=gen())
    for size in (18, 17, 11, 3):
        torch.testing.assert_close(few(inputs[:size]), residual(inputs[:size]))
    assert sizes == [18, 18, 16, 4]


def test_copies_serve_again_while_the_model_is_the_same(residual):
    inputs = torch.rand(8, 3, 12, 12, generator=gen())

    def copy_of(**options):
        return attacks.prepare(residual, inputs, **options).faster

    first, low = copy_of(), copy_of(precision=torch.bfloat16)
    assert low is not first
    assert copy_of() is first
    assert copy_of(precision=torch.bfloat16) is low
    with torch.no_grad():
        residual[0].weight.mul_(1.01)
    second = copy_of()
    assert second is not first, "the version of a tensor"
    residual[0].weight.data.mul_(1.01)
    assert copy_of() is not second, "the logits"
    torch.testing.assert_close(copy_of()(inputs), residual(inputs), atol=1e-5, rtol=1e-4)


def test_a_new_copy_is_compared_on_more_inputs_than_one_that_serves_again(residual):
    inputs = torch.rand(8, 3, 12, 12, generator=gen())
    seen = []
    residual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))

    def compared_on():
        seen.clear()
        attacks.prepare(residual, inputs)
        return seen

    assert compared_on() == [4]
    assert compared_on() == [2]
    residual[0].weight.data.mul_(1.01)  # which the logits alone show
    assert compared_on() == [2, 4]


@pytest.mark.parametrize("averaged", [{}, {"draws": 2}, {"draws": 2, "when": "afterwards"}])
@pytest.mark.parametrize("change", ["a step of training", "running statistics", "another tensor", "precision"])
def test_a_network_follows_its_model_through_training(cnn_problem, change, averaged):
    """A stale copy would make every later attack weaker, and the model look robust."""
    model, inputs, labels = cnn_problem
    options = {"precision": torch.bfloat16} if change == "precision" else {"fast": True}
    averaged = dict(averaged)
    afterwards = averaged.pop("when", "") == "afterwards"
    network = attacks.prepare(model, inputs, **options, **({} if afterwards else averaged))
    attacks.pgd(network, inputs, labels, generator=gen(), **CALL)
    with torch.no_grad():
        if change == "running statistics":
            model[1].running_var.mul_(9.0)
        elif change == "another tensor":
            model[-1].weight.data = model[-1].weight.flip(0)
        else:
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=gen()), alpha=float(p.std()))
    labels = model(inputs).argmax(1)
    if afterwards:  # what is stale must not pass for new by being averaged
        network = attacks.prepare(network, inputs, **averaged)
    with pytest.warns(attacks.AttackWarning, match="has changed since it was prepared") as caught:
        found = attacks.pgd(network, inputs, labels, generator=gen(), **CALL)
    assert caught[0].filename == __file__
    anew = attacks.prepare(copy.deepcopy(model), inputs, **options, **averaged)
    assert torch.equal(found, attacks.pgd(anew, inputs, labels, generator=gen(), **CALL))
    assert (network.rounding, network.exact) == (anew.rounding, anew.exact)
    followed = network.faster
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacks.pgd(network, inputs, labels, generator=gen(), **CALL)
        assert network.faster is followed
        model[0].weight.data.mul_(1.0)  # which cannot be seen, and
        with torch.no_grad():
            model[0].weight.mul_(2.0)  # which can be, but was said before
        attacks.pgd(network, inputs, labels, generator=gen(), **CALL)
    assert network.faster is not followed


def test_a_kept_copy_shares_nothing_with_the_model_and_dies_with_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    inputs = torch.rand(2, 3, 4, 4)
    network = attacks.prepare(model, inputs)
    before = network.ascend(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(network.ascend(inputs), before)
    alive = weakref.ref(model)
    del model, network, parameter
    gc.collect()
    assert alive() is None


def test_a_padded_1x1_convolution_is_left_to_the_model():
    # PyTorch's channels_last kernels do not take all of them.
    model = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2, padding=1), nn.Flatten(), nn.Linear(36, 5)).eval()
    assert attacks.prepare(model, torch.rand(4, 3, 4, 4)).exact


def test_a_copy_computes_in_its_own_precision_under_autocast(cnn_problem):
    model, inputs, labels = cnn_problem
    network = attacks.prepare(model, inputs)
    assert not network.exact
    want = network.ascend(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for images in (inputs, inputs[:1]):
            x = images.clone().requires_grad_()
            logits = network.ascend(x)
            assert torch.allclose(logits, want[: len(images)], atol=1e-5)
            torch.autograd.grad(logits.sum(), x)
        attacks.pgd(model, inputs, labels, eps=0.05, steps=3, fast=True)


def test_errors_name_the_argument(cnn_problem):
    model, inputs, _ = cnn_problem
    with pytest.raises(ValueError, match="precision must be"):
        attacks.prepare(model, inputs, precision=torch.float64)
    with pytest.raises(TypeError, match="inputs must be"):
        attacks.prepare(model, [1.0])


def test_a_copy_that_fails_says_nothing(capfd):
    """torch.fx prints the code of a graph that raises, which is nobody's concern where a copy is only tried."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(256, 10)

        def forward(self, x):
            return nn.functional.linear(self.conv(x).flatten(1), self.head.weight, self.head.bias)

    model, inputs = Net().eval(), torch.rand(2, 3, 8, 8)
    made = _prepare._rewritten(model, inputs, torch.bfloat16)
    with pytest.raises(RuntimeError):
        made(inputs)
    assert capfd.readouterr().err == ""


class Checking(nn.Module):
    """Asks for the shape of its input in every way, as image models of Hugging Face and timm do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        batch, channels, height, width = x.shape
        if channels != self.conv.in_channels or len(x.shape) != 4 or height % 2:
            raise ValueError("three channels are needed")
        y = torch.relu(self.norm(self.conv(nn.functional.pad(x, [0, width % 2, 0, 0]))))
        windows = y.flatten(2).transpose(1, 2).reshape(batch * 2, -1, 4)
        tokens = torch.cat([self.token.expand(batch * 2, -1, -1), windows], 1).mean(1)
        return {"logits": self.head(tokens.view(x.size(0), 2, 4).sum(1))}


def test_models_that_ask_for_shapes_have_a_copy_for_batches_of_all_sizes():
    torch.manual_seed(0)
    model = Checking().eval()
    images = torch.rand(6, 3, 8, 8)
    network = attacks.prepare(model, images)
    assert network.faster is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.faster.model.modules())  # folded
    for size in (1, 2, 3, 5, 6):
        made = network.faster(images[:size])["logits"]
        assert torch.allclose(made, model(images[:size])["logits"], atol=1e-5)


def test_a_copy_that_holds_the_size_of_a_batch_is_not_to_be_had():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 10)

        def forward(self, x):
            if x.shape[1] != 3:
                raise ValueError("three channels are needed")
            return self.head(self.conv(x).flatten(1)) * (2.0 if len(x) > 3 else 1.0)

    assert attacks.prepare(Scaled().eval(), torch.rand(6, 3, 8, 8)).faster is None


def test_small_networks_in_training_have_no_copy(monkeypatch):
    """The first attack does not know; one on weights as they were makes a copy again."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.PReLU(), nn.Flatten(), nn.Linear(12544, 10)).eval()
    inputs = torch.rand(4, 3, 16, 16)
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", LEAST)

    def copied():
        return not _prepare.network_of(model, inputs, fast=True, precision=None).exact

    assert copied()
    assert copied()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.mul_(0.9)
        assert not copied()
    assert copied()
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", LEAST / _prepare._IN_TRAINING)
    with torch.no_grad():
        model[0].weight.mul_(0.9)
    assert copied(), "a larger one does"


class AsksForShapes(nn.Module):
    """Cannot be traced without an example."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x if len(x.shape) == 4 and int(x.shape[1]) == 3 else x[:, :3])


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="only the compiled library packs")
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_freed_as_soon_as_they_are_packed(wrapped, monkeypatch):
    """torch.fx's tracer is part of a cycle, and would hold them until garbage is collected."""
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 64, 3),
        nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64 * 16, 5),
    ).eval()  # fmt: skip
    model = AsksForShapes(body).eval() if wrapped else body
    folded = []

    def noted(made):
        fold(made)
        folded.extend(weakref.ref(m.weight) for m in made.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3)

    fold = _prepare.fold
    monkeypatch.setattr(_prepare, "fold", noted)
    gc.disable()
    try:
        faster = attacks.prepare(model, torch.rand(2, 3, 10, 10), fast=True).faster
        assert faster is not None
        assert len(folded) == 2
        assert all(weight() is None for weight in folded)
    finally:
        gc.enable()
