"""Proportions over images that were chosen by another measurement."""

from types import SimpleNamespace

import numpy as np

from fastlip.study.analysis.summaries import gaussian_of_same_norm, smallest
from fastlip.study.settings.rules import Rules


def test_noise_counts_where_there_is_a_smallest_perturbation_to_be_as_long_as():
    label = np.zeros(4, dtype=int)
    arrays = {
        "smallest-pgd": {"found": np.array([True, True, False, True])},
        # The third image was given noise of length 0, and the fourth was wrong to begin with.
        "gaussian-of-same-norm": {"label": label, "prediction": np.array([0, 1, 0, 0])},
    }
    stored = SimpleNamespace(
        right=np.array([True, True, True, False]),
        rules=Rules(),
        images=arrays.__getitem__,
        decided=lambda name: arrays[name]["prediction"] == arrays[name]["label"],
    )
    found = gaussian_of_same_norm(stored)
    assert (found["k"], found["n"]) == (1, 2)


def test_an_image_without_a_perturbation_counts_with_its_own_ceiling():
    """What is hidden lies above it; above another image's ceiling it need not lie."""
    arrays = {
        "distortion": np.array([0.1, np.inf, np.inf, 0.0]),
        "ceiling": np.array([0.5, 0.4, 0.6, 0.9]),
        "stretch": np.ones(4),
        "found": np.array([True, False, False, True]),
    }
    right = np.array([True, True, True, False])
    stored = SimpleNamespace(right=right, rules=Rules(), images=lambda name: arrays)
    found = smallest(stored, "gaussian")
    assert found["mean_with_ceiling"]["value"] == np.mean([0.1, 0.4, 0.6])
    assert found["mean"]["value"] == 0.1
    assert found["ceiling"] == 0.9
