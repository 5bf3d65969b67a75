"""Transfer between linear models, where what an adversarial image of one is to the other is known in closed form."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastlip.data import ImageSet
from fastlip.study.errors import StudyError
from fastlip.study.measure import transfer
from fastlip.study.measure.images import Images, merged
from fastlip.study.pipeline.measurement_stages import _TransferImages
from fastlip.study.settings import overrides, presets
from fastlip.study.storage.files import write_arrays

NORMS = (0.05, 0.1)
SETTINGS = overrides.override(presets.preset("demo"), ["pgd.steps=20", "transfer.l2=0.05,0.1"])


def nothing(done, total, note):
    pass


class Linear(nn.Module):
    """Two classes, told apart by a hyperplane through the middle of the box; it keeps what it was asked about."""

    def __init__(self, normal):
        super().__init__()
        self.normal = nn.Parameter(normal / normal.norm(), requires_grad=False)
        self.asked = []

    def forward(self, x):
        self.asked.append(x.detach().clone())
        signed = (x - 0.5).flatten(1) @ self.normal
        return torch.stack([signed, -signed], 1)


@pytest.fixture(scope="module")
def pair():
    """Two models whose normals are orthogonal."""
    one, other = torch.randn(2, 192, generator=torch.Generator().manual_seed(0))
    other = other - (other @ one) / (one @ one) * one
    return Linear(one), Linear(other)


def images(model, pixels=None, batch_size=7):
    if pixels is None:
        pixels = torch.randint(90, 166, (40, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    return Images(ImageSet(pixels, labels, ("a", "b"), "test"), torch.device("cpu"), batch_size)


def distances(model, given):
    """Distance of each image from the boundary."""
    return ((given.at(slice(None)) - 0.5).flatten(1) @ model.normal).abs().numpy()


@pytest.fixture(scope="module")
def made(pair):
    return transfer.adversarial_images(pair[0], images(pair[0]), SETTINGS, 3, nothing)


def test_every_perturbation_has_the_norm_wanted(pair, made):
    np.testing.assert_allclose(made["l2"], np.tile(NORMS, (40, 1)), rtol=1e-5)
    moved = made["perturbed"] - images(pair[0]).at(slice(None)).numpy()[:, None]
    np.testing.assert_allclose(np.linalg.norm(moved.reshape(40, 2, -1), axis=2), made["l2"], rtol=1e-4)
    assert made["perturbed"].min() >= 0
    assert made["perturbed"].max() <= 1


def test_a_linear_model_is_fooled_by_its_own_wherever_the_norm_exceeds_the_distance(pair, made):
    given = images(pair[0])
    found = transfer.judged(pair[0], given, {"own": made}, NORMS, 3, nothing)
    assert found["source"].tolist() == ["own"]
    assert found["strength"].tolist() == list(NORMS)
    for j, norm in enumerate(NORMS):
        share = norm / distances(pair[0], given)
        fooled = found["prediction"][0, j] != found["label"]
        assert fooled[share > 1.1].all()
        assert not fooled[share < 1].any()
    assert 0 < fooled.sum() < 40  # both happen


def test_what_fools_one_is_to_an_orthogonal_one_as_noise(pair, made):
    given = images(pair[1])
    found = transfer.judged(pair[1], given, {"other": made}, NORMS, 3, nothing)
    # Noise moves the image along the normal by its norm over the square root of the number of pixels.
    far = distances(pair[1], given) > 4 * max(NORMS) / np.sqrt(192)
    assert 20 < far.sum() < 40
    for name in ("prediction", "noise_prediction"):
        np.testing.assert_array_equal(found[name][0][:, far], np.tile(found["label"][far], (2, 1)))


def test_noise_has_the_norm_that_the_box_left_to_the_perturbation(pair):
    # White and black pixels: half of the directions leave the box.
    pixels = 255 * torch.randint(0, 2, (6, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    given = images(pair[0], pixels)
    norms = (2.0, 12.0)
    settings = dataclasses.replace(SETTINGS, transfer=dataclasses.replace(SETTINGS.transfer, l2=norms))
    made = transfer.adversarial_images(pair[0], given, settings, 3, nothing)
    np.testing.assert_allclose(made["l2"][:, 0], 2.0, rtol=1e-5)
    assert (made["l2"][:, 1] < 11.9).all()  # about half of the 192 pixels have room, in either direction
    pair[0].asked.clear()
    transfer.judged(pair[0], given, {"own": made}, norms, 3, nothing)
    x = given.at(slice(None))
    asked = [(z - x).flatten(1).norm(dim=1).numpy() for z in pair[0].asked]
    assert len(asked) == 4  # adversarial, noise; adversarial, noise
    np.testing.assert_allclose(np.stack(asked[::2], 1), made["l2"], rtol=1e-4)
    np.testing.assert_allclose(np.stack(asked[1::2], 1), made["l2"], rtol=1e-4)


def test_noise_is_made_once_for_all_sources_and_is_that_of_one(pair, made):
    given = images(pair[1])
    one = transfer.judged(pair[1], given, {"a": made}, NORMS, 3, nothing)
    pair[1].asked.clear()
    shorter = made | {"l2": made["l2"] * np.where(np.arange(40) < 5, 0.5, 1.0)[:, None]}
    three = transfer.judged(pair[1], given, {"a": made, "b": made, "c": shorter}, NORMS, 3, nothing)
    assert sum(map(len, pair[1].asked)) == 3 * 2 * 40 + 2 * 40 + 2 * 5
    for name in ("prediction", "noise_prediction"):
        np.testing.assert_array_equal(three[name][0], one[name][0])
        np.testing.assert_array_equal(three[name][1], one[name][0])


@pytest.mark.parametrize("batch_size", [1, 40])
def test_images_and_decisions_do_not_depend_on_batches_and_processes(pair, made, batch_size):
    parts = [
        transfer.adversarial_images(pair[0], images(pair[0], batch_size=5).shard(rank, 3), SETTINGS, 3, nothing)
        for rank in range(3)
    ]
    for name, values in merged(parts).items():
        np.testing.assert_allclose(values, made[name], atol=1e-6)
    given = images(pair[1], batch_size=batch_size)
    expected = transfer.judged(pair[1], images(pair[1]), {"a": made}, NORMS, 3, nothing)
    found = transfer.judged(pair[1], given, {"a": made}, NORMS, 3, nothing)
    for name in ("prediction", "noise_prediction"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_what_the_source_misclassifies_is_left_as_it_is(pair):
    given = images(pair[0])
    given.labels = given.labels.clone()
    given.labels[:3] = 1 - given.labels[:3]
    made = transfer.adversarial_images(pair[0], given, SETTINGS, 3, nothing)
    assert (made["l2"][:3] == 0).all()
    assert (made["l2"][3:] > 0).all()
    np.testing.assert_array_equal(made["perturbed"][:3, 0], given.at(slice(3)).numpy())


def test_the_images_of_one_model_at_a_time_are_read_and_those_of_another_run_refused(pair, made, tmp_path):
    run = SimpleNamespace(settings=SETTINGS, images=lambda name, what: tmp_path / f"{name}-{what}.npz")
    given = images(pair[0])
    stored = _TransferImages(run, ["a", "b", "c"], given)
    assert list(stored) == ["a", "b", "c"]
    assert len(stored) == 3
    write_arrays(run.images("a", "transfer-images"), made)  # those of "b" and "c" are not looked at yet
    np.testing.assert_array_equal(stored["a"]["perturbed"], made["perturbed"])
    write_arrays(run.images("b", "transfer-images"), {name: values[:-1] for name, values in made.items()})
    write_arrays(run.images("c", "transfer-images"), made | {"perturbed": made["perturbed"][..., :4]})
    for name in "bc":
        with pytest.raises(StudyError, match=f"{name}-transfer-images.npz is damaged .*not those of this run"):
            _ = stored[name]
