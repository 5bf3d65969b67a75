"""Certificates, corruptions and the stronger suite on models with known results."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fastlip.data import ImageSet, cifar10_c
from fastlip.study.measure import corruptions, smoothing, strong_attacks
from fastlip.study.measure.images import Images
from fastlip.study.settings.attacks import StrongSuiteSettings
from fastlip.study.settings.measurements import GENERATED_CORRUPTIONS, SmoothingSettings


def nothing(done, total, note):
    pass


@pytest.fixture
def linear():
    """Two classes, and images at known distances from the boundary between them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 192, generator=generator))
        model[1].bias.zero_()
    pixels = torch.randint(90, 166, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    images = Images(ImageSet(pixels, labels, ("a", "b"), "test"), torch.device("cpu"), 6)
    normal = (model[1].weight[0] - model[1].weight[1]).detach()
    distance = ((images.at(slice(0, 20)).flatten(1) @ normal).abs() / normal.norm()).double().numpy()
    return model.eval().requires_grad_(False), images, distance


def test_a_certified_radius_is_cohens():
    low = stats.beta.ppf(0.001, 990, 1000 - 990 + 1)  # one-sided Clopper-Pearson
    assert smoothing.certified_radius(990, 1000, 0.25, 0.001) == pytest.approx(0.25 * stats.norm.ppf(low))
    assert smoothing.certified_radius(500, 1000, 0.25, 0.001) == 0.0
    assert smoothing.certified_radius(1000, 1000, 0.25, 0.001) == pytest.approx(
        0.25 * stats.norm.ppf(0.001 ** (1 / 1000))
    )


def test_smoothed_certificates_of_a_linear_model_never_exceed_the_distance_to_its_boundary(linear):
    model, images, distance = linear
    settings = SmoothingSettings(images=20, sigma=0.2, selection=20, samples=400, alpha=0.001)
    found = smoothing.smoothed(model, images, settings, 5, nothing)
    # The smoothed linear model has the same boundary, so the distance is the true radius.
    assert (found["radius"] <= distance + 1e-9).all()
    assert (found["radius"] > 0.5 * np.minimum(distance, 0.3))[distance > 0.1].all()
    right = found["prediction"] == found["label"]
    assert right[found["radius"] > 0].all()


def test_the_suite_fells_what_lies_within_reach_and_nothing_else(linear):
    model, images, distance = linear
    eps = float(np.median(distance))
    settings = StrongSuiteSettings(steps=20, targets=1, queries=20)
    found = strong_attacks.suite(model, images, ("l2", eps, eps), settings, 7, nothing)
    stands = found["prediction"] == found["label"]
    near = np.abs(distance / eps - 1) > 0.02  # nearer than that, rounding and the box decide
    np.testing.assert_array_equal(stands[near], (distance > eps)[near])
    assert (found["l2"] <= eps * (1 + 1e-5)).all()
    kept = [found[name] for name in found if name.startswith("stands/")]
    assert len(kept) == 3
    for earlier, later in itertools.pairwise(kept):
        assert (later <= earlier).all()
    np.testing.assert_array_equal(kept[-1], stands)


@pytest.mark.parametrize("name", GENERATED_CORRUPTIONS)
def test_corruptions_grow_with_severity_and_repeat(name):
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = [corruptions.corrupt(pixels, name, severity, 3) for severity in (1, 5)]
    change = [(m.float() - pixels.float()).abs().mean().item() for m in made]
    assert all(m.dtype == torch.uint8 and m.shape == pixels.shape for m in made)
    assert 0 < change[0] < change[1]
    assert torch.equal(made[1], corruptions.corrupt(pixels, name, 5, 3))


def test_corrupted_predictions_are_those_of_the_corrupted_images(linear):
    model, images, _ = linear
    found = corruptions.corrupted(model, images, (1, 5), None, ("contrast", "brightness"), 0, nothing)
    assert found["prediction"].shape == (2, 2, 20)
    darker = corruptions.corrupt(images.pixels, "contrast", 5, 0)
    np.testing.assert_array_equal(found["prediction"][0, 1], model(darker.float() / 255).argmax(1).numpy())


def test_distortion_and_stretch_under_corruptions_are_those_of_a_linear_model(linear):
    model, images, _ = linear
    found = corruptions.corrupted(model, images, (1, 5), None, ("contrast", "saturate"), 0, nothing)
    np.testing.assert_array_equal(found["clean_prediction"], images.labels.numpy())
    x = images.pixels.double() / 255
    for k, name in enumerate(("contrast", "saturate")):
        for j, severity in enumerate((1, 5)):
            moved = (corruptions.corrupt(images.pixels, name, severity, 0).double() / 255 - x).flatten(1)
            np.testing.assert_allclose(found["distortion"][k, j], moved.norm(dim=1) / np.sqrt(192), rtol=1e-5)
            stretch = (moved @ model[1].weight.double().T).norm(dim=1) / moved.norm(dim=1)
            np.testing.assert_allclose(found["stretch"][k, j], stretch, rtol=1e-3)


def test_an_image_that_a_corruption_leaves_alone_has_no_stretch(linear):
    model, images, _ = linear
    same = ImageSet(images.pixels.clone(), images.labels, ("a", "b"), "files")
    same.images[1] = 0
    found = corruptions.corrupted(model, images, (1,), lambda name, severity: same, ("fog",), 0, nothing)
    assert np.isnan(found["stretch"][0, 0]).tolist() == [i != 1 for i in range(20)]
    assert (found["distortion"][0, 0] > 0).tolist() == [i == 1 for i in range(20)]


def test_files_take_the_place_of_made_corruptions(linear):
    model, images, _ = linear
    inverted = ImageSet(255 - images.pixels, images.labels, ("a", "b"), "files")
    found = corruptions.corrupted(model, images, (3,), lambda name, severity: inverted, ("fog",), 0, nothing)
    expected = model((255 - images.pixels).float() / 255).argmax(1)
    np.testing.assert_array_equal(found["prediction"][0, 0], expected.numpy())


def test_cifar10_c_reads_the_rows_of_a_severity(tmp_path):
    labels = np.arange(50_000) % 10
    np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
    images = np.lib.format.open_memmap(tmp_path / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    images[20_000:30_000, 0, 0, 2] = 7
    images.flush()
    classes = tuple("abcdefghij")
    found = cifar10_c(tmp_path, "fog", 3, classes)
    assert len(found) == 10_000
    assert (found.images[:, 2, 0, 0] == 7).all()
    assert found.labels.tolist() == labels[:10_000].tolist()
    assert (cifar10_c(tmp_path, "fog", 1, classes).images == 0).all()
    with pytest.raises(FileNotFoundError, match=r"snow\.npy is missing"):
        cifar10_c(tmp_path, "snow", 1, classes)
    with pytest.raises(ValueError, match="severity"):
        cifar10_c(tmp_path, "fog", 6, classes)
    np.save(tmp_path / "snow.npy", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="must hold integers"):
        cifar10_c(tmp_path, "snow", 1, classes)
    (tmp_path / "snow.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="damaged"):
        cifar10_c(tmp_path, "snow", 1, classes)
