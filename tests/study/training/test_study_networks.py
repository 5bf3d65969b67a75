"""The networks of the arms by the settings, what is warned of, and what weights fit them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlip.models import REFERENCES, build_model, save_checkpoint
from fastlip.study.errors import StudyError
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.training.architectures import SOURCE, build, check_networks, parts
from fastlip.study.training.source_weights import imagenet_name, read_imagenet_weights, require_fit


def settings(*changes, preset="demo"):
    return overrides.override(presets.preset(preset), list(changes))


def test_references_take_images_as_they_are_and_resnet18_as_the_large_network():
    chosen = settings("stem=stride-1", "scale=2", "model=torchvision:squeezenet1_1")
    assert list(dict(build(chosen, "scratch", 4, 0).named_children())) == ["normalize", "enlarge", "network"]
    assert build(chosen, "finetune", 4, 0).network.features[0].stride == (1, 1)
    assert build(chosen, SOURCE, 9, 0).network.classifier[1].out_channels == 9
    assert build(chosen, "resnet18", 4, 0).network.conv1.stride == (1, 1)
    for arm in REFERENCES:
        assert list(dict(build(chosen, arm, 4, 0).named_children())) == ["normalize", "network"]


def test_dead_taps_are_warned_of():
    (line,) = check_networks(settings("model=torchvision:resnet18", "stem=imagenet"), ("softmax", "scratch"), 6)
    assert line.startswith("torchvision:resnet18 with stem=imagenet and scale=1: on images of 32 x 32, 62.2% of the")
    assert "(in layer4.0.conv2 8 of 9 taps)" in line
    assert check_networks(settings("model=torchvision:resnet18", "stem=stride-1"), ("resnet18", "scratch"), 6) == []


def test_a_run_warns_before_it_begins():
    inputs = Inputs(settings("model=torchvision:resnet18", "stem=imagenet", "arms=scratch"), InputPaths())
    inputs.require_available(begun=True)
    assert inputs.cautions == []
    inputs.require_available()
    assert len(inputs.cautions) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model=torchvision:resnet81", "--model torchvision:resnet81: torchvision has no classification model"),
        ("model=fastlip.models:nothing", r"--model fastlip\.models:nothing: fastlip\.models has no function"),
        ("model=nowhere:model", "--model nowhere:model: nowhere:model: there is no module nowhere"),
        ("stages=layer9", r"--model torchvision:resnet18: stages: the model has no module 'layer9'; the closest are"),
        ("head=conv9", r"--model torchvision:resnet18: head: the model has no module 'conv9'; the closest are"),
    ],
)
def test_wrong_networks_and_parts_are_one_line(change, message):
    inputs = Inputs(settings("model=torchvision:resnet18", change, "arms=scratch"), InputPaths())
    with pytest.raises(StudyError, match=message) as error:
        inputs.require_available()
    assert error.value.status == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stem=strid-1", r"--set stem: choose from imagenet, .*; did you mean stride-1\?"),
        ("scale=3", "--set scale: choose from 1, 2, 4, 7"),
        ("weights=IMAGENET1K_V1", "--set weights: names published ImageNet weights, which are not the source"),
    ],
)
def test_wrong_settings_of_the_network_are_one_line(change, message):
    with pytest.raises(StudyError, match=message):
        settings(change)


def test_named_parts_are_those_of_the_large_network_alone():
    chosen = settings("model=torchvision:squeezenet1_1", "stages=features.4,features.7")
    assert parts(chosen, "scratch", build(chosen, "scratch", 4, 0)).stages == [
        "network.features.4",
        "network.features.7",
    ]
    assert parts(chosen, "mlp", build(chosen, "mlp", 4, 0)).stages == ["network.relu1", "network.relu2"]


class TwoHeads(nn.Module):
    """Adds the logits of two heads, as distilled transformers do."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.head, self.head_dist = nn.Linear(4, num_classes), nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.head(x) + self.head_dist(x)


def test_several_heads_are_refused_where_a_source_gives_all_but_one(monkeypatch):
    monkeypatch.setattr("fastlip.models.two_heads", TwoHeads, raising=False)
    for arms, refused in (("scratch", False), ("scratch,finetune", True)):
        chosen = settings("model=fastlip.models:two_heads", f"arms={arms}")
        if not refused:
            assert check_networks(chosen, chosen.arms, 6) == []
            continue
        with pytest.raises(StudyError, match=r"its logits come from several heads \(head_dist, head\)") as error:
            check_networks(chosen, chosen.arms, 6)
        assert error.value.status == 2
        assert "\n" not in str(error.value)


def test_weights_of_another_network_are_one_line():
    chosen = settings("model=torchvision:squeezenet1_1", "stem=stride-1")
    require_fit(dict(build_model("torchvision:squeezenet1_1", 1000).state_dict()), chosen, "here")
    with pytest.raises(
        StudyError, match=r"^here: state_dict has no key features\.0\.weight.*--model torchvision:squeeze"
    ):
        require_fit(dict(nn.Linear(2, 2).state_dict()), chosen, "here")


def test_imagenet_weights_of_any_network(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    chosen = settings("model=torchvision:resnet18", "stem=stride-2", "weights=IMAGENET1K_V1", preset="quick")
    assert chosen.source == "imagenet"
    assert imagenet_name(chosen) == "ResNet18_Weights.IMAGENET1K_V1"
    with pytest.raises(FileNotFoundError, match=r"no ImageNet weights ResNet18_Weights\.IMAGENET1K_V1 in the cache"):
        read_imagenet_weights(chosen, download=False)
    with pytest.raises(StudyError, match=r"--set weights=V9: torchvision:resnet18 has the weights IMAGENET1K_V1"):
        imagenet_name(overrides.override(chosen, ["weights=V9"]))
    with pytest.raises(StudyError, match=r"--set weights=.*not of fastlip:mlp"):
        imagenet_name(overrides.override(chosen, ["model=fastlip:mlp", "weights="]))


def test_a_checkpoint_of_timms_network_is_a_source(tmp_path):
    pytest.importorskip("timm")
    chosen = settings("model=timm:test_efficientnet", "stem=stride-1", preset="quick")
    path = tmp_path / "own.safetensors"
    own = build_model("timm:test_efficientnet", 7, seed=3)
    save_checkpoint(path, own)
    inputs = Inputs(replace(chosen, source="checkpoint"), InputPaths(source_checkpoint=path))
    require_fit(inputs.source_weights(), chosen, str(path))


def test_partial_must_leave_something_as_the_source_has_it():
    chosen = settings("model=torchvision:resnet18", "stem=stride-1", "arms=scratch,partial")
    assert check_networks(chosen, chosen.arms, 6) == []
    whole = overrides.override(chosen, ["stages=conv1"])
    with pytest.raises(StudyError, match="partial would train all of torchvision:resnet18"):
        check_networks(whole, whole.arms, 6)
    check_networks(replace(whole, arms=("scratch", "linear")), ("scratch", "linear"), 6)
