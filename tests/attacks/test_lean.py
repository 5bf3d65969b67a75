"""A step of an attack in few calls of the dispatcher, each of which is a kernel on a GPU and microseconds on a CPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import attacks

#: Calls that a step may take, those of a linear model included; torchattacks' PGD takes 22.
MOST = {"linf": 16, "l2": 16, "l1": 17}  # the box takes what a sparse step of PGD would lose


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
@pytest.mark.parametrize("norm", list(MOST))
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
    assert 0 < made[1] - made[0] <= 20 * MOST[norm]
