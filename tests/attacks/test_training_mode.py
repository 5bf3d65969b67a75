"""Attacks in the middle of a training loop leave nothing behind that training would feel."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastlip import attacks

CALLS = {
    "pgd": partial(attacks.pgd, eps=0.05, steps=3, loss="ce", keep="last"),
    "fast": partial(attacks.pgd, eps=0.05, steps=3, loss="ce", fast=True),
    "fgsm": partial(attacks.fgsm, eps=0.05),
    "apgd": partial(attacks.apgd, eps=0.05, steps=4, target_classes=1),
    "square": partial(attacks.square, eps=0.05, queries=5),
    "min_norm": partial(attacks.min_norm, method="search", steps=2, search_steps=2),
    "criterion": partial(attacks.pgd, eps=0.05, steps=3, criterion=lambda z, y: z.argmax(1) != y),
    "evaluate": partial(attacks.evaluate, attacks={"pgd": partial(attacks.pgd, eps=0.05, steps=2)}),
    "stream": lambda model, x, y: attacks.evaluate(
        model, [(x[:8], y[:8]), (x[8:], y[8:])], attacks={"pgd": partial(attacks.pgd, eps=0.05, steps=2)}, batch_size=2
    ),
}


@pytest.fixture
def training(cnn_problem):
    """A model in the middle of training: dropout, a frozen BatchNorm and a frozen weight, gradients accumulated."""
    model, inputs, labels = cnn_problem
    torch.manual_seed(0)
    model = nn.Sequential(model[:3], nn.Dropout(0.2), *copy.deepcopy(model[3:5]), nn.BatchNorm2d(16), *model[5:])
    model.train()
    model[0][1].eval()
    model[0][0].weight.requires_grad_(False)
    functional.cross_entropy(model(inputs), labels).backward()
    return model, inputs, labels


def everything(model):
    """All that training reads of a model and of the random state."""
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "wanted": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: len(m._forward_hooks) for name, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("name", list(CALLS))
def test_nothing_is_left_behind(training, name):
    model, inputs, labels = training
    before = everything(model)
    versions = {name: p._version for name, p in model.named_parameters()}
    call = CALLS[name]
    if name not in ("evaluate", "stream", "min_norm", "fgsm"):
        call = partial(call, generator=torch.Generator().manual_seed(0))
    call(model, inputs, labels)
    after = everything(model)
    for part in ("wanted", "modes", "hooks"):
        assert before[part] == after[part], part
    assert torch.equal(before["random"], after["random"])
    for part in ("state", "grads"):
        for key, value in before[part].items():
            now = after[part][key]
            assert (value is None and now is None) or torch.equal(value, now), (part, key)
    assert {name: p._version for name, p in model.named_parameters()} == versions


def test_a_training_step_is_the_same_with_an_attack_before_it(training):
    """The update on given images, dropout masks and statistics included, does not depend on an attack before it."""
    model, inputs, labels = training

    def step(attacked):
        other = copy.deepcopy(model)
        if attacked:
            attacks.pgd(other, inputs, labels, eps=0.05, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], 0.1, momentum=0.9)
        optimizer.zero_grad()
        functional.cross_entropy(other(inputs), labels).backward()
        optimizer.step()
        return other.state_dict()

    with torch.random.fork_rng(devices=[]):
        plain, after = step(attacked=False), step(attacked=True)
    for name, value in plain.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_modes_come_back_after_an_error(training, name):
    model, inputs, labels = training
    before = {name: m.training for name, m in model.named_modules()}

    class Broken(Exception):
        pass

    calls = []

    def fail(module, args, output):
        calls.append(module.training)
        if len(calls) == 3:
            raise Broken

    handle = model.register_forward_hook(fail)
    with pytest.raises(Broken):
        CALLS[name](model, inputs, labels)
    handle.remove()
    assert before == {name: m.training for name, m in model.named_modules()}
    assert not any(calls), "the attack saw the model in eval mode"
