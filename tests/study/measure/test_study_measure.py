"""Per-image results on a linear model, whose smallest perturbations are known in closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from fastlip.attacks import min_norm
from fastlip.data import ImageSet
from fastlip.study.measure import attacks
from fastlip.study.measure.images import Images
from fastlip.study.settings import overrides, presets

SETTINGS = overrides.override(presets.preset("demo"), ["smallest.steps=20", "smallest.searches=12"])


def nothing(done, total, note):
    pass


@pytest.fixture
def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    return model.eval().requires_grad_(False)


def images(model, batch_size=5):
    pixels = torch.randint(90, 166, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    labels[0] = 1 - labels[0]  # one image that is wrong from the start
    return Images(ImageSet(pixels, labels, ("a", "b"), "test"), torch.device("cpu"), batch_size)


def test_smallest_adversarial_distortion_is_the_distance_to_the_boundary(linear):
    given = images(linear)
    found = attacks.smallest_adversarial(linear, given, SETTINGS, nothing)
    normal = linear[1].weight[0] - linear[1].weight[1]
    x = given.at(slice(0, 12)).flatten(1)
    distance = ((x @ normal + linear[1].bias[0] - linear[1].bias[1]).abs() / normal.norm()).numpy()
    assert found["found"].all()
    np.testing.assert_allclose(found["distortion"][1:], distance[1:] / np.sqrt(192), rtol=0.03)
    assert found["distortion"][0] == 0
    assert found["image"].shape == (12, 3, 8, 8)
    # A linear map to two logits stretches a perturbation along their difference by a known factor.
    stretch = (linear[1].weight @ normal).norm() / normal.norm()
    np.testing.assert_allclose(found["stretch"][1:], stretch.item(), rtol=0.05)


@pytest.mark.filterwarnings("error")
def test_an_early_epoch_that_misclassifies_most_images_is_measured_without_a_word(linear):
    wrong = images(linear)
    labels = 1 - wrong.labels
    given = Images(ImageSet(wrong.pixels, labels, ("a", "b"), "test"), torch.device("cpu"), 12)
    attacks.projected_gradient(linear, given, ("linf", 2.55, 0.01), SETTINGS, 7, nothing)
    found = attacks.smallest_adversarial(linear, given, SETTINGS, nothing)
    assert (found["distortion"] == 0).sum() == 11


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_results_do_not_depend_on_the_batches(linear, batch_size):
    for run in (
        lambda given: attacks.gaussian(linear, given, 0.1, 7, nothing),
        lambda given: attacks.projected_gradient(linear, given, ("linf", 2.55, 0.01), SETTINGS, 7, nothing),
        lambda given: attacks.smallest_gaussian(linear, given, SETTINGS, 7, nothing),
    ):
        expected, found = run(images(linear)), run(images(linear, batch_size))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_gaussian_noise_has_its_strength(linear):
    found = attacks.gaussian(linear, images(linear), 0.05, 7, nothing)
    # No pixel lies within four sigma of the box, so next to nothing is clipped.
    assert found["distortion"].mean() == pytest.approx(0.05, rel=0.05)


def test_gaussian_noise_of_a_given_norm(linear):
    lengths = np.linspace(0.0, 0.5, 12)
    found = attacks.gaussian_of_norm(linear, images(linear), lengths, 7, nothing)
    np.testing.assert_allclose(found["l2"], lengths, atol=1e-5)


def test_the_ceiling_of_gaussian_noise_is_the_strongest_that_is_tried(linear):
    given, tried = images(linear), []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(192, 2)
            self.load_state_dict({"head.weight": torch.zeros(2, 192), "head.bias": torch.tensor([1.0, 0.0])})

        def forward(self, z):
            if len(z) == len(x):
                tried.append((z.detach() - x).flatten(1).norm(dim=1) / np.sqrt(192))
            return self.head(z.flatten(1))  # never changes its mind

    given.labels = torch.zeros(12, dtype=torch.int64)
    given.batch_size = 12
    x = given.at(slice(None))
    found = attacks.smallest_gaussian(Watching(), given, SETTINGS, 7, nothing)
    assert not found["found"].any()
    assert found["ceiling"].dtype == np.float64
    np.testing.assert_allclose(found["ceiling"], torch.stack(tried).amax(0).numpy(), rtol=1e-5)
    given.batch_size = 5
    again = attacks.smallest_gaussian(Watching(), given, SETTINGS, 7, nothing)
    np.testing.assert_allclose(again["ceiling"], found["ceiling"], rtol=1e-6)


class Steep(nn.Module):
    """A slope so steep at every image that the search begins with tiny radii, and a plain beside it."""

    def forward(self, x):
        return (x - 127 / 255).flatten(1).mean(1, keepdim=True).clamp(-1e-6, 1e-6) * 100


def test_the_ceiling_of_the_search_by_pgd_is_the_largest_distortion_that_it_tried(linear):
    found = attacks.smallest_adversarial(linear, images(linear), SETTINGS, nothing)
    assert found["ceiling"].tolist() == [1.0] * 12
    given = images(linear)
    given.pixels, given.labels = torch.full((12, 3, 8, 8), 127, dtype=torch.uint8), torch.zeros(12, dtype=torch.int64)
    few = overrides.override(SETTINGS, ["smallest.searches=3"])
    model = nn.Sequential(Steep(), nn.Linear(1, 2)).eval().requires_grad_(False)
    model[1].load_state_dict({"weight": torch.tensor([[0.0], [1.0]]), "bias": torch.tensor([0.0, -1e-3])})
    found = attacks.smallest_adversarial(model, given, few, nothing)
    assert not found["found"].any()
    first = min_norm(model, given.at(slice(None)), given.labels, method="search", search_steps=1).searched.numpy()
    np.testing.assert_allclose(found["ceiling"], 16 * first / np.sqrt(192), rtol=1e-5)
    assert (found["ceiling"] < 0.1).all()


def test_nothing_found_is_infinite(linear):
    settings = overrides.override(SETTINGS, ["smallest.max_sigma=0.005", "smallest.levels=2"])
    found = attacks.smallest_gaussian(linear, images(linear), settings, 7, nothing)
    assert np.isinf(found["distortion"][~found["found"]]).all()
    assert not found["found"].all()
