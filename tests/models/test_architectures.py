"""Networks by name: what is built, and what is refused in one line."""

import sys

import pytest
import torch
import torchvision
from torch import nn

import fastlip
from fastlip.models import REFERENCES, STEMS, Normalize, build_model, stored_name
from fastlip.models._torch_modules import Expanded, expand_timm_layers


def small(num_classes):
    """A network of one's own; takes normalised images."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, num_classes)
    )


def adaptive(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes),
    )  # fmt: skip


class Functional(nn.Module):
    """A stem whose pool is no module."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 4, 7, stride=2, padding=3), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(self.conv1(x), 2).mean((2, 3)))


class TwoOutputs(nn.Module):
    """Another output in training mode, as networks with auxiliary heads have."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        logits = self.fc(x.mean((2, 3)))
        return (logits, logits) if self.training else logits


def wrong_shape(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes + 1))


def no_module(num_classes):
    return 3


def other_arguments(classes):
    return small(classes)


HERE = __name__


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_references_are_small_and_of_their_depth(name):
    model = build_model(f"fastlip:{name}", 7, seed=0)
    assert list(dict(model.named_children())) == ["normalize", "network"]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == {"softmax": 1, "mlp": 3, "convnet": 5}[name]
    assert sum(p.numel() for p in model.parameters()) < 3e6


def test_references_take_the_size_of_the_image():
    assert build_model("fastlip:convnet", 3, image_size=(24, 16), mean=[0.5], std=[1.0])(
        torch.rand(2, 1, 24, 16)
    ).shape == (2, 3)


def test_a_function_of_ones_own():
    model = build_model(f"{HERE}:small", 5, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert model(torch.rand(3, 3, 32, 32)).shape == (3, 5)
    assert isinstance(model[0], Normalize)
    assert model.normalize.mean.flatten().tolist() == pytest.approx([0.1] * 3)


def test_images_are_enlarged_inside_the_model():
    model = build_model(f"{HERE}:adaptive", 5, scale=4, seed=0).eval()
    assert list(dict(model.named_children())) == ["normalize", "enlarge", "network"]
    seen = []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.rand(2, 3, 8, 8)
    model(x)
    expected = nn.functional.interpolate(model.normalize(x), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(seen[0], expected)
    # Exact norms: upper sides from random starts differ from call to call.
    inner = fastlip.lipschitz_bound(model.network, (3, 32, 32), method="svd").upper
    bound = fastlip.lipschitz_bound(model, (3, 8, 8), method="svd").upper
    assert 0.5 < bound / (4 * inner / 0.224) <= 1 + 1e-6
    assert fastlip.local_lipschitz(model, x).max().item() <= bound


@pytest.mark.parametrize(
    ("stem", "stride", "kernel", "pool"),
    [("imagenet", 2, 7, True), ("stride-2", 2, 7, False), ("stride-1", 1, 7, False), ("stride-1-pool", 1, 7, True),
     ("cifar", 1, 3, False)],
)  # fmt: skip
def test_stems_are_what_their_names_say(stem, stride, kernel, pool):
    assert stem in STEMS
    model = build_model("torchvision:resnet18", 3, stem=stem, seed=0)
    conv = model.network.conv1
    assert (conv.stride, conv.kernel_size) == ((stride, stride), (kernel, kernel))
    assert isinstance(model.network.maxpool, nn.MaxPool2d) == pool
    kept = build_model("torchvision:resnet18", 3, seed=0).state_dict()
    same = all(v.shape == kept[k].shape for k, v in model.state_dict().items())
    assert same == (stem != "cifar")
    if same:
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_resnets_start_with_short_paths_as_before():
    network = build_model("torchvision:resnet50", 3, seed=4).network
    torch.manual_seed(4)
    peer = torchvision.models.resnet50(num_classes=3, zero_init_residual=True)
    assert all(torch.equal(v, peer.state_dict()[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("resnet18", {}, r"a model is named by torchvision:NAME.*got 'resnet18'; did you mean torchvision:resnet18\?$"),
        ("torchvision:resnet81", {}, r"no classification model 'resnet81'; did you mean .*resnet18"),
        ("torchvision:deeplabv3_resnet50", {}, "no classification model 'deeplabv3_resnet50'"),
        ("fastlip:convnets", {}, "fastlip:convnets: choose softmax, mlp or convnet"),
        (f"{HERE}:smal", {}, r"has no function 'smal'; did you mean .*small"),
        (f"{HERE}:HERE", {}, "has no function 'HERE'"),
        (f"{HERE}:no_module", {}, "must return a torch module, got int"),
        (f"{HERE}:other_arguments", {}, "is called with num_classes= alone"),
        (f"{HERE}:wrong_shape", {}, r"logits of shape \[2, 4\], got shape \[2, 5\] in evaluation mode"),
        (f"{HERE}:TwoOutputs", {}, r"logits of shape \[2, 4\], got tuple in training mode"),
        ("torchvision:inception_v3", {}, "torchvision:inception_v3 does not run on images of 3 x 32 x 32"),
        ("torchvision:resnet18", {"stem": "cfar"}, r"stem must be .* or cifar, got 'cfar'; did you mean cifar\?"),
        ("torchvision:resnet18", {"scale": 3}, "scale must be 1, 2, 4 or 7, got 3"),
        ("torchvision:resnet18", {"image_size": 0}, "image_size must be one or two positive numbers, got 0"),
        ("torchvision:vgg11", {"stem": "stride-1"}, "stem=stride-1 does not fit .* begins with features.0 at stride 1"),
        ("fastlip:mlp", {"stem": "cifar"}, "stem=cifar does not fit fastlip:mlp, which has no convolution"),
        ("torchvision:mobilenet_v3_small", {"stem": "stride-1-pool"}, "has no max-pool; use stem=stride-1 or imagenet"),
        (f"{HERE}:Functional", {"stem": "stride-1"}, "whose max-pool is no module"),
        ("torchvision:vit_b_16", {"stem": "stride-2"}, "does not run on images of 3 x 32 x 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_line(spec, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(spec, 4, **options)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(ImportError, match=r"there is no module torchvison; did you mean torchvision\?"):
        build_model("torchvison:resnet18", 4)
    with pytest.raises(ImportError, match=r"there is no module tests_of_nothing"):
        build_model("tests_of_nothing.inner:resnet18", 4)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'timm models need timm: pip install "fastlip\[timm\]"'):
        build_model("timm:resnet18", 4)


def test_building_leaves_modes_statistics_and_random_states_alone():
    state = torch.get_rng_state()
    model = build_model("torchvision:resnet18", 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.network.bn1.num_batches_tracked == 0
    assert torch.equal(model.network.bn1.running_mean, torch.zeros(64))


class TestTimm:
    """Networks of timm."""

    timm = pytest.importorskip("timm")

    def test_wrong_names(self):
        with pytest.raises(ValueError, match=r"timm has no model 'test_resnets'; did you mean .*test_resnet") as error:
            build_model("timm:test_resnets", 3)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "test_nfnet"]
    )
    def test_computes_what_timm_does_under_timms_names(self, name):
        model = build_model(f"timm:{name}", 5, seed=0).eval()
        options = {"img_size": (32, 32)} if name == "test_vit" else {}
        peer = self.timm.create_model(name, num_classes=5, **options).eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in model.network.state_dict().values():
            if tensor.is_floating_point():  # statistics and weights that do nothing would hide a difference
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator).abs())
        peer.load_state_dict(model.network.state_dict())
        assert list(peer.state_dict()) == list(model.network.state_dict())
        x = torch.rand(2, 3, 32, 32)
        mean, std = (torch.tensor(peer.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        expected = peer((x - mean) / std)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        again = build_model(f"timm:{name}", 5, seed=1)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(x), model(x))

    @pytest.mark.parametrize("size", [(32, 32), (7, 10), (5, 5)])
    def test_layers_of_timms_own_are_expanded(self, size):
        layers = self.timm.layers
        torch.manual_seed(0)
        network = nn.Sequential(
            layers.Conv2dSame(3, 4, 3, stride=2, bias=False), layers.BatchNormAct2d(4, act_layer=nn.ReLU6),
            layers.Conv2dSame(4, 4, 5, stride=2, groups=4), layers.BatchNormAct2d(4, apply_act=False),
            layers.Conv2dSame(4, 4, (3, 1), dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ).eval()  # fmt: skip
        x = torch.randn(5, 3, *size)
        expected, names = network(x), list(network.state_dict())
        whole = fastlip.lipschitz_bound(network, (3, *size)).upper
        expand_timm_layers(network, (3, *size))
        torch.testing.assert_close(network(x), expected)
        assert list(network.state_dict()) == names
        assert any(isinstance(m, Expanded) for m in network)
        assert {stored_name(network, n) + ".weight" for n, m in network.named_modules() if hasattr(m, "weight")} == {
            n for n in names if n.endswith("weight")
        }
        bound = fastlip.lipschitz_bound(network, (3, *size)).upper
        assert fastlip.local_lipschitz(network, x).max().item() <= min(bound, whole) * (1 + 1e-4)
        assert bound <= whole * (1 + 1e-2)
        assert len(fastlip.layer_norms(network, (3, *size))) == 4

    def test_expanded_layers_train_as_timms(self):
        layers = self.timm.layers
        torch.manual_seed(0)
        network = nn.Sequential(layers.Conv2dSame(3, 4, 3, stride=2), layers.BatchNormAct2d(4, momentum=0.3))
        x = torch.randn(4, 3, 8, 8)
        expected = network(x)
        statistics = network[1].running_mean.clone()
        network[1].reset_running_stats()
        expand_timm_layers(network, (3, 8, 8))
        torch.testing.assert_close(network.train()(x), expected)
        torch.testing.assert_close(network.state_dict()["1.running_mean"], statistics)

    def test_stems_of_timms_networks(self):
        model = build_model("timm:test_efficientnet", 3, stem="stride-1", seed=0)
        assert model.network.conv_stem.stride == (1, 1)
        with pytest.raises(ValueError, match="has no max-pool"):
            build_model("timm:test_efficientnet", 3, stem="stride-1-pool")
