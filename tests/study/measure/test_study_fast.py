"""The study's attacks follow the gradients of one faster copy of each network, and the network itself judges."""

import numpy as np
import pytest
import torch
from torch import nn

from fastlip.attacks import _prepare
from fastlip.data import ImageSet
from fastlip.study.measure import attacks, strong_attacks
from fastlip.study.measure.images import Images
from fastlip.study.settings import overrides, presets

SETTINGS = overrides.override(
    presets.preset("demo"),
    [
        "pgd.steps=5",
        "smallest.steps=4",
        "smallest.searches=4",
        "strong.steps=5",
        "strong.targets=1",
        "strong.queries=5",
    ],
)
BALL = ("linf", 8.0, 8 / 255)


def nothing(done, total, note):
    pass


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
        model = nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        model.train()
        model(torch.rand(64, 3, 16, 16))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def images(model):
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    return Images(ImageSet(pixels, labels, ("a", "b", "c", "d"), "test"), torch.device("cpu"), 5)


def test_all_attacks_on_a_network_share_one_copy_and_the_network_judges(monkeypatch, network):
    made = []
    faster = _prepare._faster
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 0.0)
    monkeypatch.setattr(_prepare, "_faster", lambda *a: made.append(faster(*a)) or made[-1])
    given = images(network)
    attacks.projected_gradient(network, given, BALL, SETTINGS, 7, nothing)
    strong_attacks.suite(network, given, BALL, SETTINGS.strong, 7, nothing)
    found = attacks.smallest_adversarial(network, given, SETTINGS, nothing)
    assert len(made) == 1
    assert made[0] is not None
    judged = network(torch.from_numpy(found["image"]).contiguous(memory_format=torch.channels_last)).argmax(1).numpy()
    np.testing.assert_array_equal(found["prediction"], judged)
    assert found["found"].any()
    np.testing.assert_array_equal(found["found"], judged != found["label"])
