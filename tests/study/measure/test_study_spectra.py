"""Spectra against dense singular value decompositions and closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from fastlip.data import generated
from fastlip.models import resnet18
from fastlip.study.measure import spectra
from fastlip.study.measure.images import Images
from fastlip.study.measure.perturbed_images import depth_points
from fastlip.study.measure.spectra import effective_rank, singular_values, stable_rank
from fastlip.study.settings import overrides, presets

SETTINGS = overrides.override(presets.preset("demo"), ["pgd.steps=2", "features.images=10"])
BALL = ("linf", 4.0, 4 / 255)


def nothing(done, total, note):
    pass


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 3)])
def test_singular_values_are_those_of_the_decomposition(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(singular_values(matrix), torch.linalg.svdvals(matrix.double()).numpy(), rtol=1e-6)


def test_ranks_in_closed_form():
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert stable_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert stable_rank(np.array([2.0, 1.0])) == pytest.approx(1.25)
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4)))
    assert effective_rank(np.zeros(2)) == stable_rank(np.zeros(2)) == 0.0


def test_weights_have_their_spectrum_and_their_distance():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    start = {"0.weight": 2 * model[0].weight.detach(), "2.weight": torch.zeros(5, 4)}
    found = spectra.weights(model, start)
    assert found["layer"].tolist() == ["0", "2"]
    np.testing.assert_allclose(found["distance"], [0.5, np.nan])
    expected = torch.linalg.svdvals(model[0].weight.detach().double().flatten(1))
    np.testing.assert_allclose(found["0"], expected.numpy(), rtol=1e-6)


@pytest.fixture(scope="module")
def network():
    model = resnet18(6, seed=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # the last of each block starts at zero, and would hide its branch
            module.weight.data = 1 + 0.1 * torch.randn(module.weight.shape, generator=generator)
    return model


def test_features_are_those_of_the_stages(network):
    images = Images(generated("target", "test", 12), torch.device("cpu"), 4)
    found = spectra.features(network, images, BALL, SETTINGS, 3, nothing)
    kept = []
    handle = network.network.layer2.register_forward_hook(lambda module, inputs, output: kept.append(output))
    network(images.at(slice(0, 10)))
    handle.remove()
    matrix = kept[0].permute(0, 2, 3, 1).flatten(0, 2).double()
    expected = torch.linalg.svdvals((matrix - matrix.mean(0)) / len(matrix) ** 0.5).numpy()
    np.testing.assert_allclose(found["clean/layer2"][:20], expected[:20], rtol=1e-4)
    assert len(found["pgd/pooled"]) <= 9  # ten images, less their mean
    assert found["growth/pgd"].shape == (10, len(found["stage"]))
    right = network(images.at(slice(0, 10))).argmax(1).numpy() == images.labels[:10].numpy()
    assert (found["growth/pgd"][~right] == 0).all()  # what is wrong already is left alone
    assert (found["growth/pgd"][right] > 0).all()


def test_depth_points_are_the_stem_and_every_block(network):
    assert len(depth_points(network)) == 1 + 8
    assert depth_points(nn.Linear(2, 2)) == []
