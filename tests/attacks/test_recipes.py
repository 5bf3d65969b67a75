"""Copies of small networks after a step of training, which are made without tracing, and when they are not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_models import (
    POOLED,
    WHOLE,
    Global,
    Normalised,
    check,
    problem,
    sequential,
    small_networks,
)
from torch import nn
from torch.nn import functional

from fastlip import attacks, ops
from fastlip.attacks import _prepare
from fastlip.attacks._prepare import network_of
from fastlip.attacks._recipe import Remade

pytestmark = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="only the compiled library packs")


def trained_on(model):
    """What a step of training does to weights and statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.01)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1)
                module.running_var.mul_(1.2)


@pytest.mark.parametrize("name", [*WHOLE, *POOLED])
def test_copies_in_training_are_made_without_tracing(name, monkeypatch):
    make = WHOLE[name] if name in WHOLE else POOLED[name][0]
    model, x = problem(make)
    network_of(model, x, fast=True, precision=None)
    monkeypatch.setattr(_prepare, "_traced", None)  # not to be called
    for _ in range(3):
        trained_on(model)
        made = network_of(model, x, fast=True, precision=None).faster
        assert isinstance(made.model, Remade)
        assert made.keeps_nothing
        for batch in (1, 5, 23):
            check(made, model, torch.rand(batch, *x.shape[1:]))
    again = network_of(model, x, fast=True, precision=None).faster
    assert again is made, "the weights are the same"


def test_copies_for_images_of_any_size_are_traced():
    """What is prepared may be attacked on images of other sizes."""
    pooled, x = problem(Global)
    network_of(pooled, x, fast=True, precision=None)
    trained_on(pooled)
    assert isinstance(network_of(pooled, x, fast=True, precision=None).faster.model, Remade)
    network = attacks.prepare(pooled, x, fast=True)
    assert small_networks(network.faster)
    trained_on(pooled)
    larger = torch.rand(3, 3, 24, 20)
    labels = pooled(larger).argmax(1)
    with pytest.warns(attacks.AttackWarning, match="prepared again"):
        attacks.pgd(network, x, pooled(x).argmax(1), eps=0.01, steps=2)
    check(network.faster, pooled, larger)
    attacks.pgd(network, larger, labels, eps=0.01, steps=2)
    assert isinstance(network_of(pooled, larger, fast=True, precision=None).faster.model, _prepare.fx.GraphModule)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.factor = WHOLE["modules"](), 1.0

    def forward(self, x):
        return self.model(x * self.factor)


class Adapted(nn.Conv2d):
    """With a change of low rank, 0 to begin with, and learned."""

    def __init__(self, conv):
        super().__init__(8, 16, 3, 2, 1)
        self.load_state_dict(conv.state_dict())
        self.down, self.up = torch.randn(8, 72) * 0.1, torch.zeros(16, 8)

    def forward(self, x):
        return super().forward(x) + functional.conv2d(x, (self.up @ self.down).view_as(self.weight), None, 2, 1)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("change", ["hook", "gradient", "patched", "adapter", "slope"])
def test_changes_of_other_images_or_of_the_gradient_alone(change, trains):
    """With and without new weights, for several attacks."""
    model, x = problem(lambda: sequential(nn.Flatten(), nn.Linear(256, 5)))
    for _ in range(2):
        check(network_of(model, x, fast=True, precision=None).faster, model, x)
        trained_on(model)
    if change == "hook":
        model[3].register_full_backward_hook(lambda module, grads, out: (0.2 * grads[0],))
    elif change == "gradient":
        model[3] = Straight()
    elif change == "patched":
        model[3].forward = lambda x: x.relu() * 0.5 + x.relu().detach() * 0.5
    elif change == "adapter":
        model[2] = Adapted(model[2])
    elif change == "slope":
        model[3] = nn.LeakyReLU(1e-4)
    for _ in range(3):
        if trains:
            trained_on(model)
        if change == "adapter":
            model[2].up += 2e-4 * torch.randn(16, 8)
        made = network_of(model, x, fast=True, precision=None).faster
        if made is not None:
            check(made, model, 3 * torch.rand(7, *x.shape[1:]))


class Straight(nn.Module):
    """A ReLU with another gradient."""

    def forward(self, x):
        return x.relu() * 0.5 + x.relu().detach() * 0.5


def test_a_recipe_is_for_images_of_one_size(monkeypatch):
    """For others the network counts as what it was: too small for a copy in training."""
    model, x = problem(Global)
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 1e5)
    assert network_of(model, x, fast=True, precision=None).faster is not None
    trained_on(model)
    assert isinstance(network_of(model, x, fast=True, precision=None).faster.model, Remade)
    trained_on(model)
    assert network_of(model, torch.rand(5, 3, 20, 20), fast=True, precision=None).faster is None
    assert isinstance(network_of(model, x, fast=True, precision=None).faster.model, Remade)


@pytest.mark.parametrize("change", ["number", "hook", "hook of a container", "class"])
def test_changes_that_the_compared_images_do_not_show(change):
    model, x = problem(Scaled)
    network_of(model, x, fast=True, precision=None)
    for step in range(3):
        trained_on(model)
        if step == 1 and change == "number":
            model.factor = 1.0 + 1e-7
        elif step == 1 and change == "class":
            model.model[1].__class__ = type("Other", (nn.ReLU,), {})
        elif step == 1:
            hooked = model.model[2] if change == "hook" else model.model
            hooked.register_forward_hook(lambda module, given, out: out.clamp(max=1e3))
        made = network_of(model, x, fast=True, precision=None).faster
        check(made, model, torch.rand(7, *x.shape[1:]))
        assert step == 2 or isinstance(made.model, Remade) == (step == 0)


@pytest.mark.parametrize("change", ["stride", "layer", "more layers", "activation"])
def test_a_model_of_another_structure_is_traced_anew(change):
    model, x = problem(lambda: sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))
    network_of(model, x, fast=True, precision=None)
    trained_on(model)
    if change == "stride":
        model[2].stride = (1, 1)
    elif change == "layer":
        model[2] = nn.Conv2d(8, 16, 5, padding=2)
    elif change == "more layers":
        model.append(nn.Linear(5, 3))
    else:
        model[1] = nn.Tanh()
    made = network_of(model, x, fast=True, precision=None).faster
    assert not isinstance(made.model, Remade)
    check(made, model, x)


def test_recipes_hold_no_model():
    model, x = problem(WHOLE["batch norm"])
    network_of(model, x, fast=True, precision=None)
    trained_on(model)
    network_of(model, x, fast=True, precision=None)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("name", ["modules", "batch norm"])
def test_copies_of_models_that_normalise_are_made_without_tracing(name, monkeypatch):
    """With the mean and the deviation as they are by then."""
    model, x = problem(lambda: Normalised(WHOLE[name](), also_read=False))
    network_of(model, x, fast=True, precision=None)
    with monkeypatch.context() as patched:
        patched.setattr(_prepare, "_traced", None)
        for _ in range(2):
            trained_on(model)
            model.mean.add_(0.1)
            model.deviation = model.deviation * 1.1
            made = network_of(model, x, fast=True, precision=None).faster
            assert isinstance(made.model, Remade)
            for own in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                check(own, model, torch.rand(7, *x.shape[1:]))
    model.also_read = True
    trained_on(model)
    made = network_of(model, x, fast=True, precision=None).faster
    assert not isinstance(made.model, Remade)
    check(made, model, x)
