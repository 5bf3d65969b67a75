import sys

import pytest
import torch
import torchvision
from torch import nn

from fastlip import models


def test_normalize_agrees_with_torchvision():
    x = torch.rand(2, 3, 5, 4)
    mean, std = [0.1, 0.5, 0.7], [0.2, 0.3, 1.5]
    peer = torchvision.transforms.Normalize(mean, std)
    torch.testing.assert_close(models.Normalize(mean, std)(x), peer(x))
    assert set(models.Normalize(mean, std).state_dict()) == {"mean", "std"}
    with pytest.raises(ValueError, match="mean and std"):
        models.Normalize(mean, [1.0, 0.0, 1.0])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_is_torchvision_behind_a_normalisation(name):
    model = getattr(models, name)(10, seed=0).eval()
    peer = getattr(torchvision.models, name)(num_classes=10).eval()
    peer.load_state_dict(model.network.state_dict())
    x = torch.rand(2, 3, 32, 32)
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(model(x), peer(normalise(x)))


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 1), ("cifar", 4)])
def test_stems(stem, size):
    model = models.resnet18(7, stem=stem, seed=0).eval()
    shapes = []
    model.network.layer4.register_forward_hook(lambda m, i, out: shapes.append(out.shape))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert shapes[0][2:] == (size, size)


def test_seed_decides_the_weights_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    one, other, third = models.resnet18(3, seed=1), models.resnet18(3, seed=1), models.resnet18(3, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.network.fc.weight, other.network.fc.weight)
    assert torch.equal(one.network.conv1.weight, other.network.conv1.weight)
    assert not torch.equal(one.network.conv1.weight, third.network.conv1.weight)
    models.resnet18(3)
    assert not torch.equal(torch.get_rng_state(), state)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_classes"):
        models.resnet18(1)
    with pytest.raises(ValueError, match="stem"):
        models.resnet18(10, stem="vgg")


@pytest.mark.parametrize("prefix", ["", "network.", "module."])
def test_load_backbone_keeps_the_head(prefix):
    source, model = models.resnet18(100, seed=1), models.resnet18(10, seed=2)
    source.network.bn1.running_mean.fill_(3.0)
    head = model.network.fc.weight.clone()
    models.load_backbone(model, {prefix + k: v for k, v in source.network.state_dict().items()})
    for key, value in model.network.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(value, source.network.state_dict()[key])
    assert torch.equal(model.network.fc.weight, head)


def test_load_backbone_takes_a_whole_model_and_keeps_the_normalisation():
    source = models.resnet18(100, seed=1, mean=(0.1,) * 3, std=(0.2,) * 3)
    model = models.resnet18(10, seed=2)
    models.load_backbone(model, source.state_dict())
    assert torch.equal(model.network.layer4[1].conv2.weight, source.network.layer4[1].conv2.weight)
    assert model.normalize.mean.flatten()[0] == pytest.approx(0.485)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: models.resnet50(10, seed=0).state_dict(), "network.layer1.0.conv1.weight of shape"),
        (lambda: models.resnet18(10, stem="cifar", seed=0).state_dict(), "network.conv1.weight of shape"),
        (lambda: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "has no bn1.weight"),
        (lambda: nn.Linear(3, 3).state_dict(), "no key conv1.weight"),
        (lambda: {**models.resnet18(10, seed=0).state_dict(), "network.layer5.x": torch.zeros(1)}, "layer5.x"),
    ],
)
def test_another_architecture_is_one_clear_error(state, message):
    model = models.resnet18(10, seed=0)
    before = model.network.conv1.weight.clone()
    with pytest.raises(ValueError, match=message) as error:
        models.load_backbone(model, state())
    assert "\n" not in str(error.value)
    assert torch.equal(model.network.conv1.weight, before)


def test_imagenet_weights_that_cannot_be_had_are_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(OSError, match="neither cached nor to be had") as error:
        models.imagenet_weights()
    assert "\n" not in str(error.value)


def test_imagenet_weights_come_from_the_cache(monkeypatch):
    expected = models.resnet50(1000, seed=0).network.state_dict()
    enum = torchvision.models.ResNet50_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: expected)
    model = models.resnet50(10, seed=1)
    models.load_backbone(model, models.imagenet_weights())
    assert torch.equal(model.network.conv1.weight, expected["conv1.weight"])


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("torchvision", lambda path: models.resnet18(10)),
        ("safetensors.torch", lambda path: models.save_checkpoint(path / "x.safetensors", nn.Linear(2, 2))),
        ("safetensors.torch", lambda path: models.load_checkpoint(path / "x.safetensors")),
    ],
)
def test_without_an_extra_the_error_names_it(monkeypatch, tmp_path, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "fastlip\[study\]"'):
        call(tmp_path)
