"""Models as people have them: of one batch size, compiled, scripted, random, without gradients, with other outputs."""

import io
import warnings
from functools import partial

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn

from fastlip import attacks
from fastlip.attacks._model import Network

EPS = 0.06


@pytest.fixture
def problem(cnn_problem):
    model, inputs, labels = cnn_problem
    return model, inputs[:16], labels[:16]


class OneSize(nn.Module):
    def __init__(self, model, size=16):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x):
        return self.model(x.view(self.size, 3, 12, 12))


class Squeezing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).squeeze()


def calls(model, inputs, labels):
    draws = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    return {
        "pgd": lambda: attacks.pgd(model, inputs, labels, eps=EPS, steps=6, generator=draws()),
        "apgd": lambda: attacks.apgd(model, inputs, labels, eps=EPS, steps=6, target_classes=2, generator=draws()),
        "square": lambda: attacks.square(model, inputs, labels, eps=0.2, queries=60, generator=draws()),
        "min_norm": lambda: (
            attacks.min_norm(model, inputs, labels, method="search", steps=4, search_steps=4).adversarial
        ),
        "fast": lambda: attacks.pgd(model, inputs, labels, eps=EPS, steps=6, fast=True, generator=draws()),
        "evaluate": lambda: (
            attacks.evaluate(
                model, inputs, labels, {"pgd": partial(attacks.pgd, eps=EPS, steps=6)}, batch_size=16
            ).adversarial
        ),
    }


@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "min_norm", "fast", "evaluate"])
def test_a_model_of_one_batch_size(problem, name):
    model, inputs, labels = problem
    found = calls(OneSize(model).eval(), inputs, labels)[name]()
    want = calls(model, inputs, labels)[name]()
    assert (model(want).argmax(1) != labels).sum() not in (0, 16) or name == "min_norm"
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_a_last_batch_that_is_smaller(problem):
    model, inputs, labels = problem
    suite = {"pgd": partial(attacks.pgd, eps=EPS, steps=6), "square": partial(attacks.square, eps=EPS, queries=5)}
    found = attacks.evaluate(OneSize(model, 10).eval(), inputs, labels, suite, batch_size=10)
    want = attacks.evaluate(model, inputs, labels, suite, batch_size=10)
    assert torch.equal(found.robust, want.robust)
    assert 0 < found.robust.sum() < 16


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_head_that_squeezes(problem, size):
    model, inputs, labels = problem
    labels = labels[:size].clone()
    labels[1:] += 1  # all but one have fallen already
    options = {"eps": EPS, "steps": 3, "random_start": False}
    found = attacks.pgd(Squeezing(model).eval(), inputs[:size], labels % 10, **options)
    torch.testing.assert_close(found, attacks.pgd(model, inputs[:size], labels % 10, **options), rtol=0, atol=1e-5)
    assert (found != inputs[:size]).flatten(1).any(1).tolist() == [True] + [False] * (size - 1)


def test_what_fails_at_any_size_says_why(problem):
    _, inputs, labels = problem

    def broken(x):
        if len(x) < 16:
            raise RuntimeError("no such size")
        return x.flatten(1)[:, :10] * torch.linspace(1, 2, 10)

    class Fallen(nn.Module):
        def forward(self, x):
            raise RuntimeError("always")

    assert attacks.pgd(broken, inputs, labels, eps=EPS, steps=2).shape == inputs.shape
    with pytest.raises(RuntimeError, match="always"):
        attacks.pgd(Fallen(), inputs, labels, eps=EPS)


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_compiled_model_is_compiled_for_few_sizes(problem, dynamic):
    model, inputs, labels = problem
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", dynamic=dynamic)
    found = attacks.pgd(compiled, inputs, labels, eps=EPS, steps=10, random_start=False)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < (model(found).argmax(1) != labels).sum() < 16
    assert graphs <= 2, "one with gradients and one without"
    network = attacks.prepare(compiled, inputs)
    assert not network.exact
    assert network.model is compiled
    dynamo.reset()


def test_same_size_may_be_chosen(problem):
    model, inputs, labels = problem
    seen = set()
    model.register_forward_hook(lambda module, args, output: seen.add(len(args[0])))
    attacks.pgd(attacks.prepare(model, inputs, fast=False), inputs, labels, eps=EPS, steps=6)
    assert len(seen) > 1
    seen.clear()
    attacks.pgd(attacks.prepare(model, inputs, fast=False, same_size=True), inputs, labels, eps=EPS, steps=6)
    assert seen == {16}
    with pytest.raises(TypeError, match="same_size must be"):
        attacks.prepare(model, inputs, same_size=1)


def script(model):
    return torch.jit.script(model)


def loaded(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", [script, loaded, lambda model: torch.jit.freeze(torch.jit.script(model))])
def test_torchscript(problem, form):
    model, inputs, labels = problem
    suite = {"pgd": partial(attacks.pgd, eps=EPS, steps=6, random_start=False)}
    found = attacks.evaluate(form(model), inputs, labels, suite)
    want = attacks.evaluate(model, inputs, labels, suite)
    assert torch.equal(found.robust, want.robust)
    assert found.counts == {}
    with pytest.raises(TypeError, match="TorchScript"):
        with attacks.count_forward_backward(form(model)):
            pass


class Probe(nn.Module):
    """A head on features without gradients, whose weights want some."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(10, 10)
        nn.init.eye_(self.head.weight)

    def forward(self, x):
        with torch.no_grad():
            features = self.model(x)
        return self.head(features)


class Rounded(Probe):
    def forward(self, x):
        return self.model(torch.from_numpy((x.detach().numpy() * 15).round() / 15))


@pytest.mark.parametrize("kind", [Probe, Rounded])
def test_no_gradient_reaches_the_input(problem, kind):
    model, inputs, _ = problem
    model = kind(model).eval()
    labels = model(inputs).argmax(1)
    assert any("differentiably" in sentence for sentence in attacks.diagnose(model, inputs, labels))
    for attack in (partial(attacks.pgd, eps=EPS), partial(attacks.apgd, eps=EPS), attacks.min_norm):
        with pytest.raises(ValueError, match="must depend differentiably"):
            attack(model, inputs, labels)
    suite = {"pgd": partial(attacks.pgd, eps=0.3), "square": partial(attacks.square, eps=0.3, queries=40)}
    with pytest.warns(attacks.AttackWarning, match="pgd was left out"):
        found = attacks.evaluate(model, inputs, labels, suite)
    assert found.attacks == ("square",)
    assert found.success.shape == (1, 16)
    assert found.robust_accuracy < 1
    with pytest.raises(ValueError, match="must depend differentiably"):
        attacks.evaluate(model, inputs, labels, {"pgd": suite["pgd"], "fmn": attacks.min_norm}, check=False)


def test_a_model_whose_output_depends_on_the_batch(problem):
    model, inputs, labels = problem
    assert not any("batch" in sentence for sentence in attacks.diagnose(model, inputs, labels))
    model[1].track_running_stats, model[1].running_mean, model[1].running_var = False, None, None
    assert any("other images of the batch" in sentence for sentence in attacks.diagnose(model, inputs, labels))


class Noisy(nn.Module):
    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.model(x) + self.scale * torch.randn(len(x), 10)


def test_draws_judge_a_random_model(problem):
    """At radius 0 an image falls by chance alone; the more draws decide, the fewer do."""
    model, inputs, labels = problem
    inputs, labels = inputs.repeat(8, 1, 1, 1), labels.repeat(8)
    with torch.no_grad():
        top = model(inputs).topk(2).values
    noisy = Noisy(model, float((top[:, 0] - top[:, 1]).median()))
    suite = {str(k): partial(attacks.pgd, eps=0.0, steps=1) for k in range(3)}
    torch.manual_seed(0)
    robust = {}
    for draws in (1, 64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            robust[draws] = attacks.evaluate(noisy, inputs, labels, suite, draws=draws).robust_accuracy
    assert robust[1] < 0.5
    assert robust[64] > 0.9


def test_eot_follows_the_mean(problem):
    model, inputs, labels = problem
    network = attacks.prepare(Noisy(model, 1.0), inputs, fast=False, draws=3, eot=4000)
    assert not network.exact
    torch.manual_seed(0)
    x = inputs[:2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(network.ascend(x)[:, 0].sum(), x)
    torch.manual_seed(0)
    want = torch.stack([(model(x) + torch.randn(2, 10)).softmax(1) for _ in range(4000)]).mean(0).log()
    (expected,) = torch.autograd.grad(want[:, 0].sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4)
    assert attacks.prepare(network, inputs) is network
    assert attacks.prepare(network, inputs, draws=2).draws == 2
    for name in ("draws", "eot"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            attacks.prepare(model, inputs, **{name: 0})
        with pytest.raises(ValueError, match=f"{name} must be"):
            attacks.evaluate(model, inputs, labels, {}, **{name: 0})


def test_mean_prediction_of_excluded_classes():
    """A class that every draw excludes stays excluded, without NaN in any gradient."""
    logits = torch.tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    network = Network(lambda x: logits + 0 * x.sum(), draws=2, eot=2)
    out = network.judge(torch.zeros(1, 2))
    torch.testing.assert_close(out, logits.log_softmax(1))
    (grad,) = torch.autograd.grad(out[0, 0], logits)
    assert grad.isfinite().all()


class Masked(nn.Module):
    """A class-incremental head: the classes to come are excluded by -inf."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).masked_fill(torch.arange(10) >= 6, -torch.inf)


@pytest.mark.parametrize("loss", ["dlr", "ce", "margin"])
def test_excluded_classes_change_no_figure(problem, loss):
    model, inputs, _ = problem
    masked, sliced = Masked(model).eval(), lambda x: model(x)[:, :6]
    labels = sliced(inputs).argmax(1)
    assert attacks.diagnose(masked, inputs, labels) == attacks.diagnose(sliced, inputs, labels)
    network = attacks.prepare(masked, inputs)
    assert not network.exact
    for call in (
        lambda m: attacks.pgd(m, inputs, labels, eps=EPS, loss=loss, random_start=False),
        lambda m: attacks.min_norm(m, inputs, labels, method="search", loss=loss, steps=4, search_steps=4).adversarial,
    ):
        found, want = call(masked), call(sliced)
        assert not torch.equal(want, inputs)
        # Sums over classes may be rounded in another order, by which an image or two go another way.
        lengths = [torch.linalg.vector_norm((t - inputs).flatten(1), dim=1) for t in (found, want)]
        assert ((lengths[0] - lengths[1]).abs() <= 0.05 * lengths[1] + 1e-3).double().mean() > 0.8
        assert torch.equal(sliced(found).argmax(1), sliced(want).argmax(1))


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "form",
    [lambda z: {"logits": z, "loss": None}, lambda z: (z, z[:, :2]), lambda z: [z], Output],
    ids=["dict", "tuple", "list", "object"],
)
def test_outputs_in_other_forms(problem, form):
    model, inputs, labels = problem

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return form(self.model(x))

    wrapped = Wrapped().eval()
    for options in ({}, {"fast": True}):
        found = attacks.pgd(wrapped, inputs, labels, eps=EPS, random_start=False, **options)
        torch.testing.assert_close(found, attacks.pgd(model, inputs, labels, eps=EPS, random_start=False, **options))
    found = attacks.evaluate(wrapped, inputs, labels, {"pgd": partial(attacks.pgd, eps=EPS, steps=6)})
    assert found.counts["pgd"].forward > 0
    assert found.counts["pgd"].backward > 0
    assert attacks.prepare(wrapped, inputs).exact == (form is Output), "torch.fx makes no objects"


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_logit_of_two_classes(shape):
    """The smallest perturbation of a linear binary model in closed form."""
    weight = torch.randn(12, generator=torch.Generator().manual_seed(0))
    inputs = 0.5 + 0.02 * torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    offset = (inputs @ weight).mean()

    def model(x):
        return (x @ weight - offset).reshape(shape)

    labels = (model(inputs).flatten() > 0).long()
    assert 0 < labels.sum() < 8
    found = attacks.min_norm(model, inputs, labels, norm="l2")
    truth = model(inputs).flatten().abs() / weight.norm()
    assert found.found.all()
    torch.testing.assert_close(found.distance.float(), truth, rtol=0.03, atol=1e-6)
    targets = 1 - labels
    assert ((model(attacks.pgd(model, inputs, labels, eps=0.3, targets=targets)).flatten() > 0) == (targets == 1)).all()
