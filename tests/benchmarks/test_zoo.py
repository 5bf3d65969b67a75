"""The zoo's lists, and what a row says of a network."""

import math
from collections import Counter

import _zoo_models
import pytest
import torch
import zoo
from _zoo_models import Entry
from torch import nn


class Odd(nn.Module):
    """Two operations without a rule."""

    def forward(self, x):
        return torch.digamma(x).flatten(1) + torch.lgamma(x).flatten(1)


@pytest.fixture
def small(monkeypatch):
    """One model of its own for each name."""
    models = {
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5)),
        "odd": Odd,
        "broken": lambda: nn.Linear(3, 3),
    }
    monkeypatch.setattr(zoo, "build", lambda entry: models[entry.name]().eval())


def test_the_list_is_fixed():
    listed = _zoo_models.entries()
    assert Counter(entry.family for entry in listed) == {
        "torchvision": 80,
        "timm": 95,
        "robustbench": 65,
        "transformers": 19,
    }
    assert len(set(listed)) == 259
    configured = {e.name for e in listed if e.family == "transformers"}
    assert configured == set(_zoo_models._CONFIGURATIONS)


def test_all_of_torchvision_is_in_it():
    models = pytest.importorskip("torchvision.models")
    assert {e.name for e in _zoo_models.entries() if e.family == "torchvision"} == set(models.list_models(models))


def test_what_is_constant_is_shaken():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Linear(8, 8), nn.Linear(8, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    weight = model[1].weight.detach().clone()
    _zoo_models._shake(model)
    assert model[0].weight.unique().numel() == model[0].bias.unique().numel() == 8
    assert model[1].weight.equal(weight)
    assert model[2].weight.all(), "a head of zeros"


def test_a_bound_stands_beside_the_stretch(small):
    torch.manual_seed(0)
    row = zoo.measured(Entry("x", "linear", 4), "bound")
    assert row["verdict"] == "accepted"
    assert row["weights"] == 245
    assert row["found_in"] == "float64"
    assert row["domain"] == "within [0, 1]"
    # Power iteration finds the norm of a linear map.
    assert row["log10_stretch"] <= row["log10_upper"] <= row["log10_stretch"] + 0.02


def test_a_refusal_names_all_that_is_missing(small):
    row = zoo.measured(Entry("x", "odd", 4), "rules")
    assert row["verdict"] == "refused"
    assert row["missing"] == "digamma; lgamma"
    assert zoo.measured(Entry("x", "broken", 4), "rules")["verdict"] == "does not run"


def test_counts_tell_what_blocks_and_what_blocks_alone():
    row = {"mode": "rules", "family": "timm", "verdict": "refused"}
    rows = [
        row | {"missing": "sort"},
        row | {"missing": "sort; fft"},
        row | {"verdict": "accepted", "missing": ""},
        row | {"mode": "bound", "missing": "other"},
    ]
    said = zoo.counts(rows, "rules")
    assert "timm: 1 of 3 accepted (2 refused)" in said
    assert "  sort: 2 (1)\n  fft: 1 (0)" in said
    assert "other" not in said


def test_the_stretch_stays_in_the_box():
    class Outside(nn.Module):
        """Steep below 0 and above 1 alone."""

        def forward(self, x):
            return x + 1e3 * (torch.relu(x - 1.0) + torch.relu(-x))

    found = zoo.stretch(Outside().double(), (2, 3, 3), rounds=4, points=2)
    assert math.isclose(found, 0.0, abs_tol=1e-6)
