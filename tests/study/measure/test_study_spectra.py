"""Spectra against dense singular value decompositions and closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from fastlip.data import generated
from fastlip.models import anatomy, build_model, resnet18
from fastlip.study.measure import network_parts, spectra
from fastlip.study.measure.images import Images
from fastlip.study.measure.network_parts import parts_of
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
    found = spectra.weights(model, start, (3, 3, 3))
    assert found["layer"].tolist() == ["0", "2"]
    np.testing.assert_allclose(found["distance"], [0.5, np.nan])
    expected = torch.linalg.svdvals(model[0].weight.detach().double().flatten(1))
    np.testing.assert_allclose(found["0"], expected.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(found["dead_taps"], [0.0, 0.0])


def test_taps_beyond_the_image_are_left_out():
    """On one pixel a padded 3x3 convolution is the matrix of its centre, whatever the other eight taps hold."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 2))
    weight = model[0].weight.detach()
    before = weight.clone()
    before[..., 1, 1] /= 3
    weight[..., 0, 0] = 1e6
    found = spectra.weights(model, {"0.weight": before}, (3, 1, 1))
    np.testing.assert_allclose(found["0"], torch.linalg.svdvals(weight[..., 1, 1].double()).numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["distance"], [2.0, np.nan])
    np.testing.assert_allclose(found["dead_taps"], [8 / 9, 0.0])


def test_layers_of_timm_keep_their_names():
    pytest.importorskip("timm")
    model = build_model("timm:test_efficientnet", 4, seed=0)
    found = spectra.weights(model, {k: 2 * v for k, v in model.state_dict().items()}, (3, 32, 32))
    assert {f"{name}.weight" for name in found["layer"].tolist()} <= set(model.state_dict())
    np.testing.assert_allclose(found["distance"], 0.5)


@pytest.mark.parametrize(
    ("shape", "rows", "channels"),
    [((2, 5), 2, 5), ((2, 5, 4, 4), 32, 5), ((2, 4, 4, 5), 32, 5), ((2, 7, 5), 14, 5), ((2, 5, 3, 4, 6), 144, 5)],
)
def test_rows_are_positions_and_columns_are_channels(shape, rows, channels):
    output = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    matrix = spectra.as_rows(output)
    assert matrix.shape == (rows, channels)
    last = len(shape) == 3 or shape == (2, 4, 4, 5)
    first = output[0][..., 0] if last else output[0][0]
    assert torch.equal(matrix[: rows // 2, 0], first.flatten())


@pytest.mark.parametrize("channels", [3, 11, 12, 40])
def test_spectra_of_few_and_of_many_rows(channels):
    matrix = torch.randn(12, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = spectra.Spectrum(channels, 12)
    for part in matrix.split(5):
        spectrum.add(part)
    expected = torch.linalg.svdvals(matrix - matrix.mean(0)).numpy() / 12**0.5
    found = spectrum.singular_values()
    assert len(found) == min(channels, 11)
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-6, atol=1e-6)


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
    assert len(found["pgd/avgpool"]) <= 9  # ten images, less their mean
    assert found["growth/pgd"].shape == (10, len(found["stage"]))
    right = network(images.at(slice(0, 10))).argmax(1).numpy() == images.labels[:10].numpy()
    assert (found["growth/pgd"][~right] == 0).all()  # what is wrong already is left alone
    assert (found["growth/pgd"][right] > 0).all()


def test_features_of_tokens_and_of_a_linear_model():
    pytest.importorskip("timm")
    images = Images(generated("target", "test", 6), torch.device("cpu"), 4)
    settings = overrides.override(SETTINGS, ["features.images=6"])
    model = build_model("timm:test_vit", 6, scale=2, seed=0).eval().requires_grad_(False)
    found = spectra.features(model, images, BALL, settings, 3, nothing)
    assert found["stage"].tolist() == ["norm_pre", *(f"blocks.{i}" for i in range(6)), "head_drop", "logits"]
    assert len(found["clean/blocks.0"]) == 64  # channels, of 6 images with 17 tokens each
    model = build_model("fastlip:softmax", 6, seed=0).eval().requires_grad_(False)
    assert spectra.features(model, images, BALL, settings, 3, nothing)["stage"].tolist() == ["logits"]


class TwoHeads(nn.Module):
    """Its logits are those of two heads together."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Linear(3 * 32 * 32, 5), nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x):
        x = self.body(x.flatten(1)).relu()
        return (self.one(x) + self.other(x)) / 2


def test_the_features_called_logits_are_what_the_model_returns():
    model = TwoHeads().eval().requires_grad_(False)
    images = Images(generated("target", "test", 12), torch.device("cpu"), 4)
    logits = model(images.at(slice(0, 10))).double()
    expected = torch.linalg.svdvals((logits - logits.mean(0)) / len(logits) ** 0.5).numpy()
    found = spectra.features(model, images, BALL, SETTINGS, 3, nothing)
    np.testing.assert_allclose(found["clean/logits"], expected, rtol=1e-4, atol=1e-7)


def test_stretch_is_observed_at_the_stem_and_every_block(network):
    images = Images(generated("target", "test", 4), torch.device("cpu"), 4)
    assert len(parts_of(network, images).points) == 1 + 8
    assert parts_of(build_model("fastlip:softmax", 6, seed=0), images).points == []


def test_parts_that_were_given_are_kept(network):
    model = build_model("fastlip:mlp", 6, seed=0)
    given = anatomy(model, (3, 32, 32), stages=["relu2"])
    network_parts.give(model, given)
    assert parts_of(model, Images(generated("target", "test", 4), torch.device("cpu"), 4)) is given
