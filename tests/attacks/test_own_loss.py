"""Losses of one's own, and callbacks."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastlip import attacks

CE = nn.CrossEntropyLoss(reduction="none")


def margin(logits, labels):
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def calls(loss):
    draws = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    return {
        "pgd": lambda *m, **o: attacks.pgd(*m, eps=0.05, steps=5, loss=loss, generator=draws(), **o),
        "fgsm": lambda *m, **o: attacks.fgsm(*m, eps=0.05, loss=loss, **o),
        "apgd": lambda *m, **o: attacks.apgd(*m, eps=0.05, steps=8, loss=loss, generator=draws(), **o),
        "square": lambda *m, **o: attacks.square(*m, eps=0.2, queries=40, loss=loss, generator=draws(), **o),
        "min_norm": lambda *m, **o: (
            attacks.min_norm(*m, method="search", steps=4, search_steps=4, loss=loss, **o).adversarial
        ),
    }


@pytest.mark.parametrize(("mine", "name"), [(CE, "ce"), (margin, "margin")])
@pytest.mark.parametrize("attack", list(calls(CE)))
@pytest.mark.parametrize("fast", [False, True])
def test_a_known_loss_as_a_function_is_that_loss(cnn_problem, attack, mine, name, fast):
    """Up to the rounding of float32, by which the operators' own are more exact."""
    model, inputs, labels = cnn_problem
    model, inputs = model.double(), inputs.double()
    for options in ({}, {"targets": (labels + 1) % 10}):
        found = calls(mine)[attack](model, inputs, labels, fast=fast, **options)
        want = calls(name)[attack](model, inputs, labels, fast=fast, **options)
        assert not torch.equal(found, inputs)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_classes_aimed_at(cnn_problem):
    model, inputs, labels = cnn_problem
    seen = []

    def pulled(logits, classes):
        seen.append(classes.clone())
        return functional.cross_entropy(logits, classes, reduction="none")

    found = attacks.apgd(model, inputs, labels, eps=0.01, steps=3, loss=pulled, target_classes=2, random_start=False)
    want = attacks.apgd(model, inputs, labels, eps=0.01, steps=3, loss="ce", target_classes=2, random_start=False)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    assert (seen[0] != labels).all()


def test_an_objective_beside_the_decision(cnn_problem):
    """The best iterate of a robust image is the one at which the caller's loss is largest."""
    model, inputs, labels = cnn_problem
    found = attacks.pgd(model, inputs, labels, eps=0.02, steps=10, loss=lambda z, y: z[:, 3], early_stop=False)
    rise = (model(found) - model(inputs))[:, 3]
    assert (rise > 0).all()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), r"loss must return a number for each image, \[32\]"),
        (lambda z, y: 3.0, "loss must return"),
        (lambda z, y: y, "loss must return"),
        (lambda z, y: torch.zeros(len(z)), "loss must depend differentiably"),
    ],
)
def test_functions_that_are_no_losses(cnn_problem, loss, message):
    with pytest.raises(ValueError, match=message):
        attacks.pgd(*cnn_problem, eps=0.05, loss=loss)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_a_callback_hears_every_step(cnn_problem, attack):
    model, inputs, labels = cnn_problem
    heard = []
    options = {"eps": 0.075, "steps": 4, "restarts": 2, "generator": torch.Generator().manual_seed(0)}
    found = attack(model, inputs, labels, callback=heard.append, **options)
    options["generator"].manual_seed(0)
    assert torch.equal(found, attack(model, inputs, labels, **options))
    first = [it for it in heard if it.run == 0]
    assert [it.step for it in first] == [0, 1, 2, 3, 4]
    assert [it.step for it in heard if it.run == 1] == [0, 1, 2, 3, 4]
    assert len(first[0].rows) == 32
    assert 0 < len(first[4].rows) < 32
    for it in heard:
        assert it.images.shape == (len(it.rows), *inputs.shape[1:])
        assert not it.images.requires_grad
        assert torch.equal(it.adversarial, model(it.images).argmax(1) != labels[it.rows])
        assert it.loss.shape == it.adversarial.shape
    fell = first[0].rows[first[0].adversarial]
    assert not set(fell.tolist()) & set(first[1].rows.tolist())


def test_a_callback_may_stop_an_attack(cnn_problem):
    class Enough(Exception):
        pass

    def stop(iteration):
        if iteration.step == 2:
            raise Enough

    with pytest.raises(Enough):
        attacks.pgd(*cnn_problem, eps=1e-4, callback=stop)
