"""Which models count as equal in structure, and that a recording of one is used for those only."""

import copy
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlip
from fastlip.norms._models import collect, weights
from fastlip.norms._models.structure import modules_of, structure


class Net(nn.Module):
    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.runs = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Other(Net):
    pass


def test_checkpoints_of_one_model_are_alike():
    one, two = Net(), Net()
    two.load_state_dict({k: v + 1 for k, v in two.state_dict().items()})
    assert structure(one) is not None
    assert structure(one) == structure(two) == structure(two.train()) == structure(copy.deepcopy(one).eval())


DIFFERENT = {
    "class": Other,
    "plain attribute": partial(Net, depth=3),
    "kind of number": partial(Net, runs=0.0),
    "truth value": partial(Net, runs=False),
    "kind of container": partial(Net, runs=[0]),
    "kind of number in a container": partial(Net, runs=(0.0,)),
    "name": partial(Net, walks=0),
    "missing child": lambda: _without(Net(), "bn"),
    "child's name": lambda: _renamed(Net()),
    "attribute in a container": partial(Net, sizes=[1, {"a": (2,)}]),
    "function": partial(Net, activation=torch.relu),
    "shape": lambda: _with(Net(), "conv", nn.Conv2d(3, 5, 3, padding=1)),
    "stride": lambda: _with(Net(), "conv", nn.Conv2d(3, 4, 3, padding=1, stride=2)),
    "dtype": lambda: Net().double(),
    "bias": lambda: _with(Net(), "head", nn.Linear(4, 2, bias=False)),
    "sharing": lambda: _with(Net(), "again", None),
}


def _without(net: Net, name: str) -> Net:
    setattr(net, name, None)
    return net


def _renamed(net: Net) -> Net:
    net._modules["norm"] = net._modules.pop("bn")
    return net


def _with(net: Net, name: str, module: nn.Module | None) -> Net:
    setattr(net, name, net.conv if module is None else module)
    return net


@pytest.mark.parametrize("build", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_not_alike(build):
    found = structure(build())
    assert found is not None
    assert found != structure(Net())


UNKNOWN = {
    "hook": lambda net: net.conv.register_forward_hook(lambda *_: None),
    "pre-hook": lambda net: net.conv.register_forward_pre_hook(lambda *_: None),
    "tensor": lambda net: setattr(net, "gate", torch.zeros(1)),
    "array": lambda net: setattr(net, "gate", np.zeros(1)),
    "array in a container": lambda net: setattr(net, "gates", [bytearray(2), np.zeros(1)]),
    "object": lambda net: setattr(net, "thing", object()),
    "modules that are not registered": lambda net: setattr(net, "others", [nn.Linear(2, 2)]),
    "integers": lambda net: net.register_buffer("depth", torch.tensor(2)),
    "another forward": lambda net: setattr(net, "forward", net.forward),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_of_what_is_unknown_nothing_is_said(change):
    net = Net()
    change(net)
    assert structure(net) is None


def test_only_the_first_of_like_models_runs(monkeypatch):
    ran = []
    run_for_layers = collect._run_for_layers

    def record(model: nn.Module, *arguments: object) -> object:
        ran.append(model)
        return run_for_layers(model, *arguments)

    monkeypatch.setattr(collect, "_run_for_layers", record)
    torch.manual_seed(0)
    models = [Net(), Net(), Other(), Net(activation=torch.tanh)]
    together = fastlip.layer_norms(models, (3, 8, 8))
    assert ran == [models[0], *models[2:]]
    for model, report in zip(models, together, strict=True):
        alone = fastlip.layer_norms(model, (3, 8, 8))
        assert list(report) == list(alone)
        for name, interval in report.items():
            assert interval.lower == pytest.approx(alone[name].lower, rel=1e-6)
    assert ran[3:] == models
    models[0].conv.stride = (2, 2)
    assert fastlip.layer_norms(models[0], (3, 8, 8)).descriptions["conv"] != together[0].descriptions["conv"]


class Scaled(Net):
    """Its output depends on an attribute of its class, which may change between two calls."""

    scale = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.interpolate(x, scale_factor=self.scale))


def test_nothing_is_remembered_from_call_to_call(monkeypatch):
    net = Scaled()
    fastlip.layer_norms(net, (3, 4, 4))
    monkeypatch.setattr(Scaled, "scale", 4)
    now = fastlip.layer_norms(net, (3, 4, 4), method="svd")["conv"]
    scale = fastlip.norms.batchnorm_scale(net.bn)
    true = fastlip.norms.module_operator(net.conv, (3, 16, 16), output_scale=scale)
    (interval,) = fastlip.norms.operator_norms([true], fastlip.norms.NormOptions(method="svd"))
    assert now.upper == pytest.approx(interval.upper, rel=1e-9)


class Average(nn.Module):
    """Runs its layer with an average of weights, which may be the layer's own, as before training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("average", self.layer.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = {"weight": self.average, "bias": self.layer.bias}
        return torch.func.functional_call(self.layer, state, (x,))


def test_a_model_whose_layers_borrow_weights_speaks_for_no_other():
    first, second = Average(), Average()
    second.average.mul_(100.0)
    assert fastlip.layer_norms(first, (3,))["layer"].upper > 0.0
    own, others = fastlip.layer_norms([first, second], (3,))
    assert list(own) == ["layer"]
    assert not others
    assert "Linear does not apply the map" in others.left_out["average"]
    assert "no use of it was seen" in others.left_out["layer.weight"]


def test_a_shape_that_is_wrong_is_so_after_one_that_is_right():
    fastlip.layer_norms(Net(), (3, 8, 8))
    with pytest.raises(ValueError, match="input_shape must be positive integers"):
        fastlip.layer_norms(Net(), (3.0, 8, 8))


class TwoNorms(nn.Module):
    """A convolution in front of one BatchNorm, then of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        nn.init.constant_(self.two.weight, 5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.conv(self.one(self.conv(x))))


def test_a_shared_layer_is_reported_with_each_batchnorm():
    report = fastlip.layer_norms(TwoNorms().eval(), (3, 6, 6))
    assert list(report) == ["conv", "conv#2"]
    assert report["conv#2"].lower == pytest.approx(5.0 * report["conv"].lower, rel=1e-6)


@pytest.mark.parametrize("spoil", ["weight", "variance", "lone variance"])
def test_a_layer_that_is_not_finite_is_named(spoil):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    tensor = {"weight": net[0].weight.data, "variance": net[1].running_var, "lone variance": net[3].running_var}[spoil]
    tensor.view(-1)[0] = float("nan")
    name, what = {"weight": ("0", "weight"), "variance": ("0", "BatchNorm"), "lone variance": ("3", "BatchNorm")}[spoil]
    with pytest.raises(ValueError, match=f"layer {name}: {what}"):
        fastlip.layer_norms(net, (3, 8, 8))


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fold", [True, False])
def test_no_layer_is_waited_for_by_itself(fold):
    layers = [m for _ in range(6) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *layers).eval()
    with Waits() as waits:
        fastlip.layer_norms(net, (3, 8, 8), fold_batchnorm=fold, method="lanczos")
    assert waits.count == 0


def test_modules_are_listed_as_torch_does():
    net = _with(Net(), "again", None)
    net.block = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), net.head), nn.Identity())
    net.nothing = None
    assert modules_of(net) == list(net.modules())


class Mixed(nn.Module):
    """Every kind of layer in front of a BatchNorm, one of them twice, and one BatchNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2)
        self.head, self.shared = nn.Linear(8, 4), nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm1d(4)])
        self.alone = nn.BatchNorm2d(8)
        for norm in (*self.norms, self.alone):
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[1](self.up(self.norms[0](self.conv(x)).relu())).relu()
        x = self.norms[2](self.shared(self.shared(x))).relu()
        return self.norms[3](self.head(self.alone(x).mean((2, 3))))


def test_joined_foldings_give_the_same_norms(monkeypatch):
    """As on a GPU, where a layer's weights in all models are scaled at once."""
    torch.manual_seed(1)
    models = [Mixed(), Mixed(), Mixed().double(), Mixed()]
    want = [fastlip.layer_norms(model, (3, 6, 6), method="svd") for model in models]
    monkeypatch.setattr(weights, "_launches_cost", lambda device: True)
    for got, report in zip(fastlip.layer_norms(models, (3, 6, 6), method="svd"), want, strict=True):
        assert list(got) == list(report)
        assert got.descriptions == report.descriptions
        for name, interval in report.items():
            assert got[name].lower == pytest.approx(interval.lower, rel=1e-12)
            assert got[name].upper == pytest.approx(interval.upper, rel=1e-12)


class _Counted(TorchDispatchMode):
    """Counts operations that would be kernels of a GPU."""

    VIEWS = ("detach", "view", "alias", "split", "select", "unsqueeze", "slice", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(name in str(func) for name in self.VIEWS)
        return func(*args, **(kwargs or {}))


def test_collecting_more_models_launches_no_more(monkeypatch):
    monkeypatch.setattr(weights, "_launches_cost", lambda device: True)
    models = [Mixed() for _ in range(9)]
    counts = []
    for some in (models[:1], models[:2], models):
        with _Counted() as counted, ExitStack() as running:
            collect.collect_layers(some, (3, 6, 6), True, True, running)  # the first runs
        counts.append(counted.count)
    # Weights and factors of two layers are joined first, and the first model's weights are watched as it runs.
    assert counts[1] == counts[2] <= counts[0] + 6 * 5


def test_numbers_are_always_the_models_own():
    """Nothing of one model's weights or statistics is remembered for another, or for itself later."""
    torch.manual_seed(2)
    one, two = Mixed(), Mixed()
    first, second = (fastlip.layer_norms(m, (3, 6, 6), method="svd") for m in (one, two))
    for name, interval in first.items():
        assert not interval.lower <= second[name].lower <= interval.upper, name
    with torch.no_grad():
        one.norms[0].running_var *= 4
        one.head.weight *= 3
    third = fastlip.layer_norms(one, (3, 6, 6), method="svd")
    assert third["conv"].lower == pytest.approx(first["conv"].lower / 2, rel=1e-3)
    assert third["head"].lower == pytest.approx(first["head"].lower * 3, rel=1e-6)
    two.norms[1].eps = 3.0
    assert fastlip.layer_norms(two, (3, 6, 6), method="svd")["up"].upper < second["up"].lower
