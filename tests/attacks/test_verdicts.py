"""Evaluate's verdicts: by images, labels and bounds of its own, on the very images that it keeps."""

from functools import partial

import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.attacks import _suite_run

EPS = 0.03
BALL = {"norm": "linf", "eps": EPS}


@pytest.fixture
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
        inputs = torch.rand(37, 3, 4, 4)
        return model, inputs, model(inputs).argmax(1)


def honest(model, x, y):
    return attacks.pgd(model, x, y, eps=EPS, steps=10, loss="margin", random_start=False)


def far(model, x, y):
    return x.copy_(torch.rand_like(x))


def far_view(model, x, y):
    return x.copy_(torch.rand_like(x)).view(len(x), -1).view_as(x)


def far_behind_the_version_counter(model, x, y):
    x.data.copy_(torch.rand_like(x))
    return x


def far_through_numpy(model, x, y):
    x.numpy()[...] = torch.rand_like(x).numpy()
    return x


def relabels(model, x, y):
    y.add_(1).remainder_(4)
    return x


def wider_box(model, x, y, bounds):
    for bound, value in zip(bounds, (-9.0, 9.0), strict=True):
        if isinstance(bound, torch.Tensor):
            bound.fill_(value)
    return (x - 5).clamp(-9, 9)


def relabels_by_ids(model, x, y, ids):
    ids.fill_(0)
    y.zero_()
    return x


@pytest.mark.parametrize("every_attack", [False, True])
@pytest.mark.parametrize(
    "attack", [far, far_view, far_behind_the_version_counter, far_through_numpy, relabels, relabels_by_ids]
)
def test_what_an_attack_writes_into_its_arguments_changes_no_verdict(problem, attack, every_attack):
    model, inputs, labels = problem
    before = inputs.clone(), labels.clone()
    plain = attacks.evaluate(model, inputs, labels, {"honest": honest}, **BALL, check=False)
    assert 0 < plain.robust_accuracy < 1, "the comparison needs images on both sides"
    suite = {"odd": attack, "honest": honest, "again": attack}
    found = attacks.evaluate(
        model, inputs, labels, suite, **BALL, batch_size=8, every_attack=every_attack, ids=torch.arange(37), check=False
    )
    assert not found.success[[0, 2]].any()
    assert torch.equal(found.success[1], plain.success[0])
    assert torch.equal(found.adversarial, plain.adversarial)
    assert torch.equal(inputs, before[0])
    assert torch.equal(labels, before[1])


def test_nor_what_it_writes_into_what_it_returned(problem):
    model, inputs, labels = problem
    returned = []

    def later(model, x, y):
        for old in returned:
            old.zero_()
        returned.append(honest(model, x, y))
        return returned[-1]

    want = attacks.evaluate(model, inputs, labels, {"a": honest}, **BALL, batch_size=5, check=False)
    found = attacks.evaluate(model, inputs, labels, {"a": later, "b": later}, **BALL, batch_size=5, check=False)
    assert torch.equal(found.adversarial, want.adversarial)


@pytest.mark.parametrize("kind", ["per image", "per channel", "floats"])
def test_nor_what_it_writes_into_the_bounds(problem, kind):
    model, inputs, labels = problem
    lo, hi = {
        "per image": (torch.zeros_like(inputs), torch.ones_like(inputs)),
        "per channel": (torch.zeros(3, 1, 1), torch.ones(3, 1, 1)),
        "floats": (0.0, 1.0),
    }[kind]
    suites = [{"a": wider_box, "b": wider_box}, {"a": partial(wider_box, bounds=(lo, hi)), "b": wider_box}]
    for suite in suites:
        found = attacks.evaluate(model, inputs, labels, suite, bounds=(lo, hi), batch_size=8, check=False)
        assert found.robust.all()
        assert torch.as_tensor(lo).max() == 0
        assert torch.as_tensor(hi).min() == 1


def test_attacks_find_the_model_in_eval_mode_and_leave_its_modes(problem):
    _, inputs, labels = problem
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 4))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def attack(network, x, y):
        seen.append([m.training for m in network.modules()])
        network(x)
        network[0].train()
        return x

    with torch.no_grad():
        labels = model.eval()(inputs).argmax(1)
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training
        attacks.evaluate(model, inputs, labels, {"a": attack}, check=False)
    assert seen == [[False] * 5]
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("batch_size", [3, 8, 37])
@pytest.mark.parametrize("given", ["to evaluate", "to both", "to the attack alone", "to one of them"])
def test_each_image_has_its_own_bounds(problem, batch_size, given):
    """Whatever fell before: the images that stand are packed anew, and their bounds with them."""
    model, inputs, labels = problem
    mask = (torch.rand(37, 3, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6).float()
    room = torch.linspace(0, 1, 37).reshape(-1, 1, 1, 1)
    lo, hi = inputs - room * mask * inputs, inputs + room * mask * (1 - inputs)
    weak = partial(attacks.pgd, eps=0.02, steps=3, random_start=False)
    strong = partial(attacks.apgd, eps=0.1, steps=5, random_start=False)
    square = partial(attacks.square, eps=0.1, queries=5)
    nearest = partial(attacks.min_norm, norm="linf", method="search", eps_max=0.1, search_steps=3, steps=3)
    suite = {"weak": weak, "strong": strong, "square": square, "nearest": nearest}
    if given in ("to both", "to the attack alone"):
        suite = {k: partial(v, bounds=(lo, hi)) for k, v in suite.items()}
    if given == "to one of them":
        suite["strong"] = partial(strong, bounds=(lo, 1.0))
        hi = torch.ones_like(hi)
    bounds = (0.0, 1.0) if given == "to the attack alone" else (lo, hi)
    if given == "to one of them":
        bounds = (lo, 1.0)
    found = attacks.evaluate(model, inputs, labels, suite, norm="linf", eps=0.1, bounds=bounds, batch_size=batch_size)
    assert (found.adversarial >= lo).all()
    assert (found.adversarial <= hi).all()
    assert not any("outside" in w for w in found.warnings)
    assert 0 < found.robust_accuracy < 1
    assert found.success[0].any(), "the later batches need other images than the first ones"
    one = attacks.evaluate(model, inputs, labels, suite, norm="linf", eps=0.1, bounds=bounds, batch_size=64)
    assert torch.equal(one.robust, found.robust)
    assert torch.equal(one.adversarial, found.adversarial)


def test_each_image_is_judged_within_its_own_bounds(problem):
    model, inputs, labels = problem
    free = torch.arange(37) % 3 == 0
    hi = torch.where(free.reshape(-1, 1, 1, 1), 1.0, inputs)
    lo = torch.where(free.reshape(-1, 1, 1, 1), 0.0, inputs)
    anywhere = partial(lambda m, x, y: honest(m, x, y))
    found = attacks.evaluate(
        model, inputs, labels, {"weak": lambda m, x, y: x, "a": anywhere}, bounds=(lo, hi), batch_size=4, check=False
    )
    plain = attacks.evaluate(model, inputs, labels, {"a": anywhere}, check=False)
    assert torch.equal(found.robust, plain.robust | ~free)
    assert (found.robust & ~plain.robust).any()


def test_more_images_than_are_diagnosed_with_bounds_of_their_own(problem):
    model, _, _ = problem
    inputs = torch.rand(70, 3, 4, 4)
    labels, bounds = model(inputs).argmax(1), (torch.zeros_like(inputs), torch.ones_like(inputs))
    assert attacks.diagnose(model, inputs, labels, bounds=bounds) == []
    assert attacks.evaluate(model, inputs, labels, {}, bounds=bounds, fast=True).robust.all()


class Wide(nn.Module):
    """Sees more than 16 bits hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 3)

    def forward(self, x):
        return self.linear(x.flatten(1).float())


@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
def test_the_image_kept_is_the_one_judged(dtype, wide, eps):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = Wide().eval(), torch.rand(150, 3, 4, 4).to(torch.bfloat16).to(dtype)
    labels = model(inputs).argmax(1)

    def attack(m, x, y):
        return attacks.pgd(m, x.to(wide), y, eps=eps, steps=10, loss="margin").to(wide)

    found = attacks.evaluate(model, inputs, labels, {"wide": attack}, norm="linf", eps=eps, check=False)
    assert found.adversarial.dtype == dtype
    assert torch.equal(model(found.adversarial).argmax(1) != labels, ~found.robust)
    moved = (found.adversarial.double() - inputs.double()).abs()
    assert moved.max() <= eps * (1 + 1e-5) + (2**-24 if wide != torch.bfloat16 else 2**-9)
    if eps == 0.1:
        assert not found.robust.all(), "the comparison needs images that fall"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rounding_goes_towards_the_image(dtype, norm):
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, 9, generator=generator), torch.zeros(100, 9)]).to(dtype)
    found = x.double() + 10 ** (-8 * torch.rand(600, 9, generator=generator)) * torch.randn(600, 9, generator=generator)
    kept = _suite_run._rounded(found, x)
    assert kept.dtype == dtype
    before, after = (t.double() - x.double() for t in (found, kept))
    assert (after.abs() <= before.abs()).all()
    assert (after * before >= 0).all()
    # No further from what was found than the next number of that dtype.
    assert (
        (torch.nextafter(kept, torch.where(before > 0, torch.inf, -torch.inf).to(dtype)).double() - x.double())
        .abs()
        .ge(before.abs())
        .all()
    )
    assert _suite_run._rounded(kept, x) is kept


@pytest.mark.parametrize(
    "wrong", [None, 3, lambda x: x[:1], lambda x: x.long(), lambda x: x[:, :1], lambda x: (x, x), lambda x: x.numpy()]
)
def test_what_no_attack_returns_is_said_with_its_name(problem, wrong):
    model, inputs, labels = problem
    with pytest.raises(ValueError, match="'mine' must return images"):
        attacks.evaluate(model, inputs, labels, {"mine": lambda m, x, y: wrong(x) if callable(wrong) else wrong})


def test_an_attack_that_did_not_run_has_no_accuracy(problem):
    model, inputs, labels = problem
    found = attacks.evaluate(model, inputs, labels, {"honest": honest})
    with pytest.raises(ValueError, match="attack must be one of honest, got 'other'"):
        found.accuracy_after("other")


def test_bounds_reach_the_attacks(problem):
    model, inputs, _ = problem
    inputs = 20 * inputs - 10
    labels = model(inputs).argmax(1)
    found = attacks.evaluate(model, inputs, labels, {"pgd": partial(attacks.pgd, eps=5.0)}, bounds=(-10.0, 10.0))
    assert not found.robust.all()
    assert not found.warnings
