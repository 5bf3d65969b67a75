"""The parts of networks: known ones, and random ones whose parts are known by construction."""

import pytest
import torch
from torch import nn

from fastlip.models import anatomy, build_model, short_name

SHAPE = (3, 32, 32)


def parts(spec, **options):
    found = anatomy(build_model(spec, 10, seed=0, **options), SHAPE)
    return [[short_name(n) for n in names] for names in (found.stages, found.points, [found.head], found.tail)]


def test_resnets():
    stages, points, head, tail = parts("torchvision:resnet18")
    assert stages == ["maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
    assert points == ["maxpool", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]
    assert head == ["fc"]
    assert tail == ["layer4", "fc"]


@pytest.mark.parametrize("stem", ["stride-1", "cifar"])
def test_a_stem_without_a_pool_ends_at_its_place(stem):
    assert parts("torchvision:resnet18", stem=stem)[0][0] == "maxpool"


def test_references():
    assert parts("fastlip:softmax") == [[], [], ["head"], ["head"]]
    assert parts("fastlip:mlp") == [["relu1", "relu2"], ["relu1", "relu2"], ["head"], ["hidden2", "head"]]
    pools = ["pool1", "pool2", "pool3", "relu"]
    assert parts("fastlip:convnet") == [pools, pools, ["head"], ["hidden", "head"]]


@pytest.mark.parametrize(
    ("spec", "stages", "head", "tail"),
    [
        ("torchvision:squeezenet1_1", "features.2 features.4 features.7 features.10 features.12 classifier.0",
         "classifier.1", "features.12 classifier"),
        ("torchvision:mobilenet_v2", "features.0 features.1 features.3 features.6 features.10 features.13 features.16 "
         "features.17 classifier.0", "classifier.1", "features.17 features.18 classifier"),
        ("torchvision:shufflenet_v2_x0_5", "maxpool stage2 stage3 stage4 conv5", "fc", "stage4 conv5 fc"),
        ("timm:test_resnet", "conv1 layer1 layer2 layer3 layer4 global_pool", "fc", "layer4 fc"),
        ("timm:test_efficientnet", "bn1 blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 global_pool", "classifier",
         "blocks.4 conv_head bn2 classifier"),
        ("timm:test_convnext", "stem stages.0 stages.1 stages.2 stages.3 head.drop", "head.fc", "stages.3 head"),
        ("timm:test_nfnet", "stem stages.0 stages.1 stages.2 stages.3 head.drop", "head.fc",
         "stages.3 final_conv head"),
        ("timm:test_vit", "norm_pre blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 head_drop", "head",
         "blocks.5 norm head"),
        # Its blocks are in a list that does not run itself.
        ("timm:test_vit_relpos", "patch_embed blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 blocks.6 blocks.7 "
         "blocks.8 head_drop", "head", "blocks.8 fc_norm head"),
    ],
)  # fmt: skip
def test_networks_of_libraries(spec, stages, head, tail):
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    found = parts(spec, scale=2 if "vit" in spec else 1)
    assert [" ".join(found[i]) for i in (0, 2, 3)] == [stages, head, tail]


def test_the_model_is_left_as_it_was():
    model = build_model("torchvision:resnet18", 10, seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.network.layer1.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    anatomy(model, SHAPE)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parts_may_be_named():
    model = build_model("torchvision:resnet18", 10, seed=0)
    found = anatomy(model, SHAPE, stages=["layer2", "network.layer3"], head="fc")
    assert found.stages == ["network.layer2", "network.layer3"]
    assert found.points == [f"network.layer{i}.{j}" for i in (2, 3) for j in range(2)]
    assert found.head == "network.fc"
    assert found.tail == ["network.layer3", "network.layer4", "network.fc"]


class Several(nn.Module):
    """Gives two tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x), x


class Odd(nn.Module):
    """A stage that gives two tensors, one that runs twice, one that never runs, and one whose output goes nowhere."""

    def __init__(self):
        super().__init__()
        self.several, self.act, self.unused, self.aside = Several(), nn.ReLU(), nn.Linear(2, 2), nn.Conv2d(4, 10, 1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.act(self.act(self.several(x)[0]))
        self.aside(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["layer22"]}, r"stages: the model has no module 'layer22'; the closest are .*layer2"),
        ({"head": "fcc"}, r"head: the model has no module 'fcc'; the closest are fc"),
        ({"head": "avgpool"}, "head=avgpool has no weights"),
        ({"stages": ["layer1.0.relu"]}, r"stages: module layer1\.0\.relu does not run exactly once"),
    ],
)
def test_wrong_names_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        anatomy(build_model("torchvision:resnet18", 10, seed=0), SHAPE, **options)
    assert "\n" not in str(error.value)


def test_modules_that_are_no_stages():
    found = anatomy(Odd(), SHAPE)
    assert found.head == "fc"
    assert not {"several", "act", "unused", "aside"} & {*found.stages, *found.points}
    with pytest.raises(ValueError, match="several gives no tensor with a row per image"):
        anatomy(Odd(), SHAPE, stages=["several"])
    with pytest.raises(ValueError, match="module unused does not run exactly once"):
        anatomy(Odd(), SHAPE, stages=["unused"])


class TwoHeads(nn.Module):
    """Logits that are added, beside layers of as many outputs in front of the head."""

    def __init__(self, alike):
        super().__init__()
        self.conv, self.narrow, self.act = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), nn.ReLU()
        self.one, self.other = nn.Linear(10, 10), nn.Linear(10 if alike else 4, 10)

    def forward(self, x):
        x = self.act(self.conv(x)).mean((2, 3))
        near = self.act(self.narrow(x))
        return self.one(near) + self.other(near if self.other.in_features == 10 else x)


@pytest.mark.parametrize("alike", [True, False])
def test_heads_that_are_added_are_all_named(alike):
    found = anatomy(TwoHeads(alike), SHAPE)
    assert (found.head, found.beside) == ("other", ["one"] if alike else ["narrow", "one"])
    assert anatomy(TwoHeads(alike), SHAPE, head="one").beside == ["other"]


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "fastlip:mlp", "torchvision:squeezenet1_1"])
def test_one_head_has_none_beside_it(spec):
    assert anatomy(build_model(spec, 10, seed=0), SHAPE).beside == []


class NoHead(nn.Module):
    """Logits that no layer gives."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * 2


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"with 4 outputs gives the logits; name it with head=NAME"):
        anatomy(NoHead(), SHAPE)
    detached = nn.Sequential(NoHead(), nn.Linear(4, 4))
    detached[0].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="no gradient with respect to the image"):
        anatomy(detached.requires_grad_(False), SHAPE)
    with pytest.raises(ValueError, match=r"logits \[B, classes\], got shape \[2, 4, 30, 30\]"):
        anatomy(nn.Conv2d(3, 4, 3), SHAPE)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.act = nn.Conv2d(width, width, 1), nn.ReLU()

    def forward(self, x):
        return x + self.conv2(self.act(self.bn1(self.conv1(x))))


class Listed(nn.Module):
    """Stages in a ModuleList."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def random_network(seed):
    """A network of random depth and wrapping, and its expected stages, points and head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    width = draw(2, 5)
    layers = [("stem", nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()))] if draw(0, 1) else []
    prefix = ""
    if not layers:
        layers = [("conv", nn.Conv2d(3, width, 3, padding=1))]
        if draw(0, 1):
            layers.append(("act", nn.ReLU()))
    expected, points = [layers[-1][0]], [layers[-1][0]]
    stages = []
    for i in range(draw(2, 4)):
        count = draw(2, 3)
        stages.append(nn.Sequential(nn.AvgPool2d(2), *(Block(width) for _ in range(count))))
        points += [f"STAGE{i}.{j + 1}" for j in range(count)]
    wrapping = draw(0, 2)
    if wrapping == 0:
        prefix = "stage"
        layers += [(f"stage{i}", stage) for i, stage in enumerate(stages)]
    else:
        prefix = "body.stages." if wrapping == 1 else "body."
        layers.append(("body", Listed(stages) if wrapping == 1 else nn.Sequential(*stages)))
    expected += [f"{prefix}{i}" for i in range(len(stages))]
    points = [p.replace("STAGE", prefix) for p in points]
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
    expected += ["flat"]
    head = draw(0, 2)
    layers.append(("head", nn.Linear(width, 7) if head else nn.Sequential(nn.Dropout(), nn.Linear(width, 7))))
    if not head:
        expected[-1] = "head.0"
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return model, expected, points, "head" if head else "head.1", [f"{prefix}{len(stages) - 1}", "head"]


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed):
    model, stages, points, head, tail = random_network(seed)
    found = anatomy(model, SHAPE)
    assert (found.stages, found.points, found.head, found.tail) == (stages, points, head, tail)
