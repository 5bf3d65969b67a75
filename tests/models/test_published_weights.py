"""Weights from elsewhere: published ones by name, and state dicts under the names of others."""

import re

import pytest
import torch
import torchvision
from torch import nn

from fastlip.models import build_model, imagenet_weights, load_backbone, published_weights


def backbone(model, head):
    return {k: v for k, v in model.network.state_dict().items() if not k.startswith(f"{head}.")}


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "fastlip:convnet"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.network."])
def test_any_network_is_loaded_but_for_its_head(spec, prefix):
    head = {"torchvision:squeezenet1_1": "classifier.1", "fastlip:convnet": "head"}.get(spec, "fc")
    source, model = build_model(spec, 10, seed=1), build_model(spec, 4, seed=2)
    before = {k: v.clone() for k, v in model.network.state_dict().items() if k.startswith(f"{head}.")}
    state = {prefix + k: v for k, v in source.network.state_dict().items()}
    load_backbone(model, {k: v for k, v in state.items() if "num_batches_tracked" not in k})
    expected = backbone(source, head)
    assert all(torch.equal(v, expected[k]) for k, v in backbone(model, head).items() if "num_batches" not in k)
    assert before
    assert all(torch.equal(model.network.state_dict()[k], v) for k, v in before.items())


def test_the_head_may_be_named():
    source, model = build_model("fastlip:mlp", 4, seed=1), build_model("fastlip:mlp", 4, seed=2)
    load_backbone(model, source.state_dict(), head="network.hidden2")
    assert torch.equal(model.network.head.weight, source.network.head.weight)
    assert not torch.equal(model.network.hidden2.weight, source.network.hidden2.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("hidden2.bias"), r"has no hidden2\.bias: it comes from another architecture"),
        (lambda s: s.update({"hidden3.bias": torch.zeros(1)}), r"has hidden3\.bias, which the model has not"),
        (lambda s: s.update({"hidden1.bias": torch.zeros(2)}), r"hidden1\.bias of shape \[2\] where .* has \[512\]"),
        (lambda s: s.update({"hidden1.bias": torch.zeros(512).char()}), r"in torch\.int8 where the model has"),
        (lambda s: s.update({"\x1b[31m": torch.zeros(1)}), r"has \\x1b\[31m, which the model has not"),
        (lambda s: s.clear(), r"has no key hidden1\.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(change, message):
    model = build_model("fastlip:mlp", 4, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = dict(build_model("fastlip:mlp", 9, seed=2).network.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        load_backbone(model, state)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_softmax_regression_has_nothing_but_its_head():
    model = build_model("fastlip:softmax", 4, seed=1)
    with pytest.raises(ValueError, match="no weights but those of its head"):
        load_backbone(model, model.state_dict())


def in_another_ports_names(network):
    """An EfficientNet's state dict as Luke Melas-Kyriazi's port names it; and its blocks, counted through."""
    state, blocks = {}, list(dict.fromkeys(re.findall(r"blocks\.\d+\.\d+", " ".join(network.state_dict()))))
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    expanding = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                 "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    squeeze = {"conv_reduce": "_se_reduce", "conv_expand": "_se_expand"}
    for key, value in network.state_dict().items():
        block = next((b for b in blocks if key.startswith(f"{b}.")), None)
        if block is None:
            layer, _, rest = key.partition(".")
            state[f"{outside[layer]}.{rest}"] = value
            continue
        layer, _, rest = key.removeprefix(f"{block}.").partition(".")
        if layer == "se":
            layer, _, rest = rest.partition(".")
            name = squeeze[layer]
        else:
            name = (expanding if f"{block}.conv_pwl.weight" in network.state_dict() else plain)[layer]
        state[f"_blocks.{blocks.index(block)}.{name}.{rest}"] = value
    return state


@pytest.mark.parametrize(("name", "stem"), [("tf_efficientnet_lite0", "imagenet"), ("efficientnet_b0", "stride-1")])
def test_efficientnets_load_under_the_names_of_another_port(name, stem):
    pytest.importorskip("timm")
    source = build_model(f"timm:{name}", 10, seed=1)
    model = build_model(f"timm:{name}", 4, stem=stem, seed=2)
    state = in_another_ports_names(source.network)
    assert len(state) == len(source.network.state_dict())
    load_backbone(model, {f"module.{k}": v for k, v in state.items()})
    expected = backbone(source, "classifier")
    assert all(torch.equal(v, expected[k]) for k, v in backbone(model, "classifier").items())
    with pytest.raises(ValueError, match=r"has _blocks\.16\.x\.weight where the model has 16 blocks"):
        load_backbone(model, state | {"_blocks.16.x.weight": torch.zeros(1)})
    state["_blocks.3._bn1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"blocks\.2\.0\.bn2\.bias of shape \[3\]"):
        load_backbone(model, state)


def test_published_weights_are_chosen_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name, cached = published_weights("torchvision:resnet50")
    assert (name, cached) == ("ResNet50_Weights.IMAGENET1K_V2", False)
    assert published_weights("torchvision:resnet50", "IMAGENET1K_V1")[0] == "ResNet50_Weights.IMAGENET1K_V1"
    file = tmp_path / "checkpoints" / torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2]
    file.parent.mkdir()
    file.touch()
    assert published_weights("torchvision:resnet50")[1]


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("torchvision:resnet50", "V1", r"has the weights IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, not 'V1'"),
        ("torchvision:resnet51", "", r"no classification model 'resnet51'; did you mean .*resnet50"),
        ("fastlip:mlp", "", r"published weights of torchvision:NAME and timm:NAME, not of fastlip:mlp"),
        ("timm:resnet18", "a1_in2k", r"timm has no weights 'a1_in2k' of resnet18; the closest are .*a1_in1k"),
        ("timm:resnet188", "", r"timm has no model 'resnet188'; did you mean .*resnet18"),
    ],
)
def test_weights_that_are_not_published_are_one_line(model, weights, message):
    if model.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message) as error:
        imagenet_weights(model=model, weights=weights)
    assert "\n" not in str(error.value)


def test_weights_come_with_what_the_library_makes_of_them(monkeypatch):
    expected = torchvision.models.shufflenet_v2_x0_5().state_dict()
    enum = torchvision.models.ShuffleNet_V2_X0_5_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: expected)
    found = imagenet_weights(model="torchvision:shufflenet_v2_x0_5")
    assert all(torch.equal(v, expected[k]) for k, v in found.items())
    load_backbone(build_model("torchvision:shufflenet_v2_x0_5", 3), found)


def test_timms_weights_that_cannot_be_had_are_one_error(monkeypatch):
    timm = pytest.importorskip("timm")

    def refuse(name, pretrained, **options):
        assert (name, pretrained, options["num_classes"]) == ("resnet18.a1_in1k", True, 1000)
        raise RuntimeError("no server\nat all")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        OSError, match=r"weights of timm:resnet18.a1_in1k are neither cached nor to be had: no server at"
    ):
        imagenet_weights(model="timm:resnet18", weights="a1_in1k")
    assert isinstance(published_weights("timm:resnet18")[1], bool)


def test_a_head_is_a_linear_layer():
    model = nn.Sequential()
    model.add_module("network", nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match="name the head"):
        load_backbone(model, {})
