"""An image that is misclassified already comes back as it is, whatever the settings."""

import itertools

import pytest
import torch
from torch import nn

from fastlip import attacks

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.1, "l2": 1.5, "l1": 10.0}
COPIES = [{}, {"fast": True}, {"precision": torch.bfloat16}, {"fast": True, "precision": torch.bfloat16}]
#: Settings of the attacks that go step by step; None stands for a given start.
WALKS = [
    {"early_stop": early_stop, "loss": loss, **({"random_start": True} if start else {"random_start": False})}
    | ({"start": ...} if start is None else {})
    for early_stop, loss, start in itertools.product((True, False), ("ce", "dlr"), (True, False, None))
] + [{"early_stop": False, "steps": 0, "random_start": False}, {"early_stop": False, "restarts": 2}]
RUNS = [{"larger_eps": True}, {"larger_eps": True, "random_start": False}, {"target_classes": 2}] + [
    {"target_classes": 2, "random_start": False, "early_stop": early_stop} for early_stop in (True, False)
]
SETTINGS = [
    *[(attacks.pgd, {"steps": 3} | w) for w in WALKS],
    *[(attacks.apgd, {"steps": 4} | w) for w in WALKS + RUNS],
    *[(attacks.fgsm, {"loss": loss}) for loss in ("ce", "dlr")],
    *[(attacks.square, {"queries": 5, "restarts": restarts}) for restarts in (1, 2)],
    *[
        (attacks.min_norm, {"method": m, "search_steps": 2, "steps": 3, "fmn_steps": 20})
        for m in ("search", "fmn", "both")
    ],
]


def images(found):
    return getattr(found, "adversarial", found)


def moved(found, inputs):
    return (images(found) != inputs).flatten(1).any(1)


def run(attack, model, inputs, labels, norm, options):
    if options.get("start") is ...:
        options = options | {"start": (inputs + 0.05).clamp(0, 1)}
    ball = {} if attack is attacks.min_norm else {"eps": EPS[norm]}
    return attack(model, inputs, labels, norm=norm, **ball, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["pgd", "apgd", "fgsm", "square", "min_norm"])
def test_misclassified_images_stay(cnn_problem, attack, norm):
    model, inputs, labels = cnn_problem
    wrong = torch.arange(32) % 2 == 0
    labels = torch.where(wrong, (labels + 1) % 10, labels)
    for function, options in SETTINGS:
        for copy in COPIES if function.__name__ == attack else ():
            found = moved(run(function, model, inputs, labels, norm, options | copy), inputs)
            assert not found[wrong].any(), (options, copy)
            assert found[~wrong].any() or options.get("steps") == 0, (options, copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_misclassified_images_stay_in_every_dtype(cnn_problem, dtype):
    model, inputs, labels = cnn_problem
    model, inputs = model.to(dtype), inputs.to(dtype)
    labels = (model(inputs).argmax(1) + 1) % 10
    for attack, options in SETTINGS:
        assert not moved(run(attack, model, inputs, labels, "linf", options), inputs).any(), (attack, options)


@pytest.mark.parametrize("attack", ["pgd", "apgd", "fgsm", "square", "min_norm"])
def test_they_stay_where_the_copy_takes_them_for_right(attack):
    """The model's word counts, wherever the copy's may be another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    inputs = torch.rand(16, 3, 2, 2)
    labels = 1 - model(inputs).argmax(1)
    doubtful = attacks.Network(model, lambda x: model(x).flip(1))
    for function, options in SETTINGS:
        if function.__name__ == attack and options.get("target_classes", 0) == 0:
            assert not moved(run(function, doubtful, inputs, labels, "linf", options), inputs).any(), options


@pytest.mark.parametrize("attack", ["pgd", "apgd", "fgsm", "square", "min_norm"])
def test_with_targets_it_is_the_images_at_their_target_that_stay(cnn_problem, attack):
    """What their labels say does not matter: one that is misclassified otherwise goes on to its target."""
    model, inputs, labels = cnn_problem
    there = torch.arange(32) % 2 == 0
    targets = torch.where(there, labels, (labels + 3) % 10)
    for function, options in SETTINGS:
        if function.__name__ == attack and not options.get("target_classes"):
            for said in (labels, (labels + 1) % 10):
                options_ = options | {"targets": targets}
                found = run(function, model, inputs, said, "linf", options_)
                assert not moved(found, inputs)[there].any(), options
                if function is not attacks.min_norm and options.get("steps") != 0:
                    assert moved(found, inputs)[~there].any(), options


def test_min_sigma_leaves_them_too(cnn_problem):
    model, inputs, labels = cnn_problem
    found = attacks.min_sigma(model, inputs, (labels + 1) % 10)
    assert torch.equal(found.adversarial, inputs)
    assert not found.distance.any()


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_keep_last_alone_moves_them_and_says_so(cnn_problem, attack):
    """It stands for the last iterate of every image, as torchattacks returns it."""
    model, inputs, labels = cnn_problem
    assert moved(attack(model, inputs, (labels + 1) % 10, eps=0.1, steps=3, keep="last"), inputs).all()
    assert "misclassified" in attacks.__doc__
    assert 'keep="last"' in attacks.__doc__


def test_telling_them_apart_costs_no_pass_where_the_images_are_the_first_iterate(cnn_problem):
    model, inputs, labels = cnn_problem
    for attack in (attacks.pgd, attacks.apgd):
        with attacks.count_forward_backward(model) as counts:
            attack(model, inputs, labels, eps=1e-6, steps=4, random_start=False, early_stop=False)
        assert (counts.forward, counts.backward) == (5 * 32, 4 * 32)
        with attacks.count_forward_backward(model) as counts:
            attack(model, inputs, (labels + 1) % 10, eps=0.1, steps=4, random_start=False, early_stop=False)
        assert (counts.forward, counts.backward) == (32, 0)
