"""The prediction for a flat decision boundary, against its simulation."""

import numpy as np
import pytest

from fastlip.metrics import flat_boundary_ratio


@pytest.mark.parametrize(("dimensions", "directions"), [(48, 1), (48, 4), (300, 8)])
def test_the_ratio_is_the_median_of_simulated_ones(dimensions, directions):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=dimensions)
    normal /= np.linalg.norm(normal)
    distance = 0.7
    noise = rng.normal(size=(4000, directions, dimensions))
    along = (noise @ normal).max(1)
    # Noise sigma z crosses the hyperplane at sigma = distance / along; where it points away, at no strength.
    gaussian = np.where(along > 0, distance / np.where(along > 0, along, 1.0), np.inf)
    adversarial = distance / np.sqrt(dimensions)
    ratio = np.median(adversarial / gaussian)
    assert flat_boundary_ratio(dimensions, directions) == pytest.approx(ratio, abs=0.03 / np.sqrt(dimensions) * 1.5)


def test_more_pixels_lower_it_and_more_directions_raise_it():
    assert flat_boundary_ratio(3072, 4) == pytest.approx(0.0180, abs=5e-5)
    assert flat_boundary_ratio(3072, 4) == pytest.approx(2 * flat_boundary_ratio(4 * 3072, 4))
    assert flat_boundary_ratio(3072, 1) == 0
    assert flat_boundary_ratio(3072, 2) < flat_boundary_ratio(3072, 4)


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        flat_boundary_ratio(*arguments)
