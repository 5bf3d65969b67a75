"""The precision of training that a run begins with."""

import dataclasses

import pytest
import torch
from torch import nn

from fastlip.study.settings.machine import Machine
from fastlip.study.settings.presets import PRESETS
from fastlip.study.training import architectures, precision

MACHINE = Machine("cpu", "bfloat16", 1, False)


class Depthwise(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, groups=groups)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.conv(x)).mean((2, 3))


@pytest.fixture
def timed(monkeypatch):
    """What is timed, and the seconds that it takes in bfloat16 and in float32."""
    seconds, runs = [2.0, 1.0], []

    def least_seconds(given, rounds):
        for run in given:
            run()
        runs.append(len(given))
        return seconds

    monkeypatch.setattr(precision, "least_seconds", least_seconds)
    return runs, seconds


def built(monkeypatch, groups):
    network = Depthwise(groups)
    monkeypatch.setattr(architectures, "build", lambda *args, **kwargs: network)


def test_a_network_with_grouped_convolutions_is_timed(monkeypatch, timed):
    runs, seconds = timed
    built(monkeypatch, 3)
    state = torch.get_rng_state()
    assert precision.precision_of_training(PRESETS["demo"], MACHINE) == "float32"
    assert runs == [2]
    assert torch.equal(state, torch.get_rng_state())
    seconds.reverse()
    assert precision.precision_of_training(PRESETS["demo"], MACHINE) == "bfloat16"


@pytest.mark.parametrize(
    ("groups", "settings", "machine", "expected"),
    [
        (1, {}, {}, "bfloat16"),
        (3, {"precision": "bfloat16"}, {}, "bfloat16"),
        (3, {}, {"device": "cuda"}, "bfloat16"),
        (3, {}, {"precision": "float32"}, "float32"),
    ],
)
def test_nothing_is_timed_where_nothing_is_open(monkeypatch, timed, groups, settings, machine, expected):
    runs, _ = timed
    built(monkeypatch, groups)
    settings = dataclasses.replace(PRESETS["demo"], **settings)
    assert precision.precision_of_training(settings, dataclasses.replace(MACHINE, **machine)) == expected
    assert not runs


def test_both_precisions_of_a_real_network_are_tried(timed):
    runs, _ = timed
    settings = dataclasses.replace(PRESETS["demo"], model="torchvision:shufflenet_v2_x0_5")
    assert precision.precision_of_training(settings, MACHINE) == "float32"
    assert runs == [2]
