"""A step of an attack in few calls of the dispatcher, each of which is a kernel on a GPU and microseconds on a CPU."""

import itertools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import attacks

#: Calls that a step may take, those of a linear model included; torchattacks' PGD takes 22.
MOST = 16


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_calls_of_a_step(attack, norm, loss, early_stop, keep):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), torch.rand(8, 3, 4, 4)
    labels = model(inputs).argmax(1)
    options = {"norm": norm, "loss": loss, "early_stop": early_stop, "keep": keep, "random_start": False}
    made = []
    for steps in (12, 32):
        with Calls() as calls:
            found = attack(model, inputs, labels, eps=1e-6, steps=steps, **options)
        assert (model(found).argmax(1) == labels).all(), "the comparison needs images that stand"
        made.append(calls.made)
    assert 0 < made[1] - made[0] <= 20 * MOST


#: Batches of float32 images that are in memory at most beside the caller's own, while all images stand. A step needs
#: the images, the iterates, what the model is given, the best ones, the results and two gradients, of which one is the
#: model's.
BATCHES = {attacks.pgd: 7.1, attacks.apgd: 10.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", list(BATCHES))
def test_memory_of_an_attack(attack, norm, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).to(dtype), torch.rand(32, 3, 32, 32).to(dtype)
    labels = model(inputs).argmax(1)
    options = {"norm": norm, "eps": 0.0, "steps": 4, "random_start": False}
    attack(model, inputs, labels, **options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = attack(model, inputs, labels, **options)
    assert torch.equal(found, inputs), "the comparison needs images that stand"
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    held = list(itertools.accumulate(nbytes for _, nbytes in changes))
    assert inputs.numel() * 4 < max(held)
    # In 16 bits the image that the model sees and its gradient come on top, and the results are half as large.
    assert max(held) / (inputs.numel() * 4) <= BATCHES[attack] + (dtype == torch.bfloat16) / 2


class Keeper(nn.Module):
    """Keeps what it is given, as a defence that compares queries does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 10)
        self.kept = []

    def forward(self, x):
        self.kept.append((x, x.detach().clone()))
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_what_a_model_was_given_is_left_alone(attack, norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = Keeper(), torch.rand(6, 3, 4, 4)
    labels = model(inputs).argmax(1)
    attack(model, inputs, labels, norm=norm, eps=0.01, steps=6, early_stop=False)
    assert len(model.kept) > 6
    assert all(torch.equal(x, seen) for x, seen in model.kept)


@pytest.mark.parametrize("kept_by", ["nothing", "a hook", "a callback", "the model"])
def test_iterates_are_copied_where_something_may_keep_them(kept_by):
    """A step changes the iterate in place: what was given to the model must stay."""
    torch.manual_seed(0)
    kept = []
    conv = nn.Conv2d(3, 4, 3, padding_mode="circular")  # which a copy does not replace
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.rand(4, 3, 8, 8)
    labels = model(x).argmax(1)
    if kept_by in ("a hook", "the model"):
        conv.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    network = attacks.prepare(model, x, fast=kept_by != "the model")
    assert (network.faster is None) == (kept_by == "the model")
    assert network.may_keep == (kept_by in ("a hook", "the model"))
    kept.clear()
    callback = (lambda iteration: kept.append(iteration.images)) if kept_by == "a callback" else None
    attacks.pgd(network, x, labels, eps=1e-4, steps=4, random_start=False, early_stop=False, callback=callback)
    if kept_by != "nothing":
        iterates = [images.detach() for images in kept if images.shape == x.shape]
        assert len(iterates) >= 5
        assert (iterates[0] - iterates[3]).abs().max() > 1e-6
        torch.testing.assert_close(iterates[0], x, atol=1e-7, rtol=0)
