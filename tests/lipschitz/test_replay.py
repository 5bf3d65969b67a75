"""The traced graph against the model: what differs is refused and named, everything else is accepted and right."""

import contextlib
import math
import pickle
import random
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune

import fastlip
from fastlip.lipschitz import lipschitz_bound


def scaled(factor: float = 1.0, features: int = 3) -> nn.Linear:
    """A linear layer that multiplies by a number."""
    layer = nn.Linear(features, features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(features))
    return layer


class Alias(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        y *= 10.0
        return x


class DenseAlias(nn.Module):
    """Features from before and after a sum, which are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = scaled()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out = h
        out += F.relu(h)
        return torch.cat([h, out], 1)


class OnTensors(nn.Module):
    """May take another branch while it is traced, when its input is no plain tensor."""

    def __init__(self, test: Callable[[object], bool]) -> None:
        super().__init__()
        self.layer, self.test = scaled(), test

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(100.0 * x) if self.test(x) else self.layer(x)


class Counting(nn.Module):
    def __init__(self, test: Callable[[int], bool]) -> None:
        super().__init__()
        self.layer, self.test, self.calls = scaled(), test, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (5.0 if self.test(self.calls) else 1.0)


class Reinterpreted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(torch.int32).view(torch.float32)


class Borrowed(nn.Module):
    """Runs its layer with another weight than the layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = scaled()
        self.register_buffer("average", 100.0 * torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.layer, {"weight": self.average}, (x,))


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = scaled()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.layer.weight.data
        self.layer.weight.data = 100.0 * kept
        y = self.layer(x)
        self.layer.weight.data = kept
        return y


class Reset(nn.Module):
    """Changes a layer's settings for the call."""

    def __init__(self, layer: nn.Module, **settings: object) -> None:
        super().__init__()
        self.layer, self.settings = layer, settings

    def forward(self, x: Tensor) -> Tensor:
        before = {name: getattr(self.layer, name) for name in self.settings}
        for name, value in self.settings.items():
            setattr(self.layer, name, value)
        y = self.layer(x)
        for name, value in before.items():
            setattr(self.layer, name, value)
        return y


class ByBatch(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Largest(nn.Module):
    """A number taken from the input's values, which the graph holds as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs().max().item()


def is_float32(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32


def hooked(where: int | None, before: bool) -> nn.Module:
    model = nn.Sequential(scaled(), nn.ReLU(), scaled())
    module = model if where is None else model[where]
    if before:
        module.register_forward_pre_hook(lambda module, args: (100.0 * args[0],))
    else:
        module.register_forward_hook(lambda module, args, output: 100.0 * output)
    return model


def patched_layer() -> nn.Module:
    layer = scaled()
    layer.forward = types.MethodType(lambda self, x: 100.0 * nn.Linear.forward(self, x), layer)
    return nn.Sequential(layer)


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 100.0 * weight, bias)


class TwiceCalled(nn.Linear):
    """The class's own ``__call__`` is what runs."""

    def __call__(self, x: Tensor) -> Tensor:
        return 100.0 * super().__call__(x)


REFUSED = {
    "type": (lambda: OnTensors(lambda x: type(x) is Tensor), (3,), "agree up to the input, and differ by"),
    "view of bits": (lambda: Reinterpreted(), (3,), "no Lipschitz rule for view to another dtype"),
    "borrowed weight": (Borrowed, (3,), r"at layer \(Linear\)|cannot be traced"),
    "swapped weight": (Swapped, (3,), r"differ by 0\.99 of the largest output at layer"),
    "slope of the call": (lambda: Reset(nn.LeakyReLU(0.1), negative_slope=9.0), (3,), r"at layer \(LeakyReLU\)"),
    "window of the call": (lambda: Reset(nn.MaxPool1d(1), kernel_size=3, stride=1, padding=1), (2, 6), "at layer"),
    "hook on a layer": (lambda: hooked(0, False), (3,), r"at 0 \(Linear\)"),
    "pre-hook on a layer": (lambda: hooked(2, True), (3,), r"agree up to 1, and differ by .* at 2 \(Linear\)"),
    "hook on an activation": (lambda: hooked(1, False), (3,), r"at 1 \(ReLU\)"),
    "data": (Largest, (3,), "no Lipschitz rule for|which depends on the numbers in the input|mixes the batch"),
    "data in a branch": (lambda: OnTensors(lambda x: bool(x.abs().max() > 20)), (3,), "which depends on data, decides"),
    "large values": (lambda: OnTensors(lambda x: type(x) is Tensor and bool(x.abs().max() > 20)), (3,), "at layer"),
    "no gradient wanted": (lambda: OnTensors(lambda x: torch.is_grad_enabled()), (3,), "at layer"),
    "gradient of the input": (lambda: OnTensors(lambda x: type(x) is Tensor and x.requires_grad), (3,), "at layer"),
    "second call": (lambda: Counting(lambda calls: calls > 1), (3,), "on what ran before"),
    "twelfth call": (lambda: Counting(lambda calls: calls > 11), (3,), "on what ran before"),
    "every other call": (lambda: Counting(lambda calls: calls % 2 == 0), (3,), "on what ran before"),
    "float32": (lambda: OnTensors(lambda x: is_float32(x)), (3,), r"at layer \(Linear\)"),
    "seven inputs": (lambda: OnTensors(lambda x: torch.is_tensor(x) and len(x) == 7), (3,), "others in its batch"),
    "batch swapped": (lambda: ByBatch(lambda x: x.transpose(0, 1)), (2, 4), "batch"),
    "mean over the batch": (lambda: ByBatch(lambda x: x.mean(0)), (2, 4), "batch"),
    "size of the batch": (lambda: ByBatch(lambda x: x * x.size(0)), (3,), "of the largest output|others in its batch"),
    "shape of the batch": (lambda: ByBatch(lambda x: x.view(2, -1)), (3,), "does not run|batch"),
    "batch subtracted": (lambda: ByBatch(lambda x: x.view(-1, 3, 1) - x.mean(0, keepdim=True)[:, :, None]), (3,), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_is_not_what_runs_is_refused(case: str) -> None:
    build, shape, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(build(), shape)


def test_a_model_that_does_not_run_with_gradients_is_compared_without() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = scaled()

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            if y.requires_grad:
                raise RuntimeError("no derivative is implemented")
            return F.relu(y)

    assert lipschitz_bound(Overwrites(), (3,)).upper == pytest.approx(lipschitz_bound(scaled(), (3,)).upper)


@pytest.mark.parametrize("alpha", [1.5, -1.5])
def test_activations_in_place_have_the_bound_of_those_out_of_place(alpha: float) -> None:
    """No gradient of ELU in place can be had from torch where its slope is negative."""
    layer = scaled()
    bounds = [
        lipschitz_bound(nn.Sequential(layer, nn.ELU(alpha, inplace=inplace), scaled()), (3,)).upper
        for inplace in (False, True)
    ]
    assert bounds[0] == bounds[1]


def test_what_is_overwritten_where_nothing_shows_is_compared_before() -> None:
    """The traced graph lacks a factor, whose effect a saturated in-place activation hides."""

    class Caught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = scaled(-1.0)
            self.layer.bias = nn.Parameter(torch.full((3,), -500.0))

        def forward(self, x: Tensor) -> Tensor:
            x = x * (5.0 if type(x) is Tensor else 1.0)
            return F.silu(self.layer(x), inplace=True)

    with pytest.raises(ValueError, match=r"differ by .* at layer \(Linear\)"):
        lipschitz_bound(Caught(), (3,))


ACCEPTED = {
    "pre-hook on the model": (lambda: hooked(None, True), 100.0),
    "hook on the model": (lambda: hooked(None, False), 100.0),
    "class with a __call__": (lambda: nn.Sequential(TwiceCalled(3, 3, bias=False)), None),
    "hook that looks on": (lambda: looked_at(hooked_nothing()), 1.0),
    "isinstance": (lambda: OnTensors(lambda x: isinstance(x, Tensor)), 100.0),
    "is_tensor": (lambda: OnTensors(torch.is_tensor), 100.0),
    "length": (lambda: OnTensors(lambda x: len(x) < 100 and x.shape[1] == 3 and x.dim() == 2), 100.0),
    "forward of a layer replaced": (patched_layer, 100.0),
    "another name of a tensor": (Alias, 10.0),
    "another name of a sum": (DenseAlias, 2.0 * math.sqrt(2.0)),
    "in place, one name": (lambda: nn.Sequential(scaled(3.0), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)), 3.0),
}


def hooked_nothing() -> nn.Module:
    return nn.Sequential(scaled(), nn.ReLU(), scaled())


def looked_at(model: nn.Module) -> nn.Module:
    seen: list[torch.Size] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    return model


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_tracing_follows_is_accepted_and_right(case: str) -> None:
    build, constant = ACCEPTED[case]
    model = build()
    if constant is None:
        constant = 100.0 * torch.linalg.matrix_norm(model[0].weight, 2).item()
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(constant, rel=1e-6)


def test_a_forward_put_on_the_model_is_what_is_bounded() -> None:
    model = nn.Sequential(scaled())
    old = model.forward
    model.forward = lambda x: 100.0 * old(x)
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(100.0)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_are_part_of_the_model(register: Callable[..., object]) -> None:
    model = nn.Sequential(scaled(), nn.Tanh(), scaled())
    handle = register(lambda module, args, *output: 3.0 * output[0] if output else (3.0 * args[0],))
    try:
        with pytest.raises(ValueError, match="does something else than its traced graph"):
            lipschitz_bound(model, (3,))
        assert fastlip.layer_norms(model, (3,)).left_out.keys() == {"0.weight", "2.weight"}
    finally:
        handle.remove()
    handle = register(lambda *_: None)
    try:
        assert lipschitz_bound(model, (3,)).upper == pytest.approx(1.0)
        assert fastlip.layer_norms(model, (3,))["0"].upper == pytest.approx(1.0)
    finally:
        handle.remove()


def test_weights_made_by_pre_hooks_are_those_of_now() -> None:
    """Old-style normalisation and pruning compute the weight in a pre-hook; before the call it may be outdated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.utils.weight_norm(model[0])
    nn.utils.spectral_norm(model[2])
    prune.l1_unstructured(model[4], "weight", 0.5)
    model(torch.randn(2, 4))
    with torch.no_grad():
        model.eval()[0].weight_g.mul_(4.0)
    kept = model[0].weight
    bound, report = lipschitz_bound(model, (4,), tight_chains=False), fastlip.layer_norms(model, (4,), method="svd")
    assert model[0].weight is kept
    model(torch.randn(2, 4))
    true = [torch.linalg.matrix_norm(model[i].weight.detach().double(), 2).item() for i in (0, 2, 4)]
    assert [report[name].upper for name in ("0", "2", "4")] == pytest.approx(true, rel=1e-5)
    assert bound.upper == pytest.approx(math.prod(true), rel=1e-5)


def test_layer_norms_leaves_out_layers_that_do_something_else() -> None:
    for build, shape in (
        (Borrowed, (3,)),
        (Swapped, (3,)),
        (lambda: hooked(0, False), (3,)),
        (lambda: hooked(2, True), (3,)),
    ):
        reasons = fastlip.layer_norms(build(), shape).left_out.values()
        assert any("does not apply the map that its weight and settings describe" in why for why in reasons)
        assert fastlip.layer_norms(build(), shape, check=False)
    model = nn.Sequential(ScaledConv(1, 1, 1))
    weight = abs(model[0].weight.item())
    assert fastlip.layer_norms(model, (1, 4, 4))["0"].upper == pytest.approx(100.0 * weight, rel=1e-5)


def test_layer_norms_leaves_out_layers_whose_use_depends_on_the_batch() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(1, 1, -1)).view_as(x)

    assert "used otherwise in a batch of two inputs" in fastlip.layer_norms(Folded(), (8,)).left_out["layer.weight"]


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.9)], ids=["BatchNorm", "Dropout"])
def test_layers_left_in_training_mode_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(scaled(), layer).eval()
    layer.train()
    with pytest.raises(ValueError, match=r"module 1 \(.*\) is in training mode though the model is in eval mode"):
        lipschitz_bound(model, (3,))
    assert layer.training
    if isinstance(layer, nn.BatchNorm1d):
        with pytest.raises(ValueError, match=r"module 1 .* is in training mode"):
            fastlip.layer_norms(model, (3,))
    assert lipschitz_bound(model.train(), (3,)).upper == pytest.approx(1.0, rel=1e-4)
    assert model.training
    assert layer.training


class Keeping(nn.Module):
    """Its train() keeps a layer in training mode, also in eval()."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def train(self, mode: bool = True) -> "Keeping":
        super().train(mode)
        self.layer.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_train_of_ones_own_decides_what_eval_mode_is(training: bool) -> None:
    message = r"Keeping \(at 1\) has a train\(\) or eval" if training else r"module 1\.layer .* in training mode"
    model = nn.Sequential(scaled(), Keeping(nn.BatchNorm1d(3))).train(training)
    for call in (lipschitz_bound, fastlip.layer_norms):
        with pytest.raises(ValueError, match=message):
            call(model, (3,))
    other = nn.Sequential(scaled(), Keeping(nn.ReLU())).train(training)
    assert lipschitz_bound(other, (3,)).upper == pytest.approx(1.0)


class Memory(nn.Module):
    """Stores its inputs, in every way a forward pass can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.features, self.trail, self.by_name, self.counts = None, [], {"inner": []}, True
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.layer(x)
        self.trail.append(self.features)
        self.by_name["last"] = self.features
        self.by_name["inner"].append(x)
        if self.counts:
            self.count += 1
        self.average = 0.5 * self.average
        return self.features.relu()


def without_counting(net: Memory) -> Memory:
    """Forward-mode derivatives cannot follow a buffer that is written to."""
    net.counts = False
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda net: lipschitz_bound(net, (3,)),
        lambda net: lipschitz_bound(net, (4,)),
        lambda net: fastlip.layer_norms(net, (3,)),
        lambda net: fastlip.local_lipschitz(without_counting(net), torch.ones(2, 3)),
    ],
    ids=["bound", "refused", "norms", "local"],
)
def test_a_model_is_left_as_it_was_found(training: bool, call: Callable[[nn.Module], object]) -> None:
    net = Memory().train(training)
    pickle.dumps(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    held, before = dict(vars(net)), torch.get_rng_state()
    grad = net.layer.weight.grad = torch.ones(3, 3)
    with contextlib.suppress(ValueError):
        call(net)
    assert all(vars(net)[name] is value for name, value in held.items() if name != "counts")
    assert list(vars(net)) == list(held)
    assert net.trail == []
    assert net.by_name == {"inner": []}
    assert net.features is None
    assert not net._forward_hooks
    assert not net.layer._forward_hooks
    assert net.layer.weight.grad is grad
    assert net.layer.weight.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    pickle.dumps(net)


class LoRA(nn.Module):
    """Merges its weights on eval() and takes them apart on train()."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(3, 1))
        self.merged = False

    def train(self, mode: bool = True) -> "LoRA":
        super().train(mode)
        if mode == self.merged:
            self.layer.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.merged else self.layer(x) + F.linear(x, self.b @ self.a)


def test_nothing_that_eval_does_is_done() -> None:
    net = LoRA()
    weight = net.layer.weight.detach().clone()
    for call in (
        lambda: lipschitz_bound(net, (3,)),
        lambda: fastlip.layer_norms(net, (3,)),
        lambda: fastlip.local_lipschitz(net, torch.randn(2, 3)),
    ):
        with contextlib.suppress(ValueError):
            call()
        assert torch.equal(net.layer.weight, weight)
        assert not net.merged
        assert net.training


def test_a_forward_that_writes_into_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.bias.add_(1.0)
            return self.layer(x)

    net = Writing()
    bias = net.layer.bias.detach().clone()
    with pytest.raises(ValueError, match=r"something else than its traced graph|on what ran before"):
        lipschitz_bound(net, (3,))
    assert torch.equal(net.layer.bias, bias)
    assert fastlip.layer_norms(net, (3,))["layer"].upper > 0.0  # which a bias has no part in
    assert torch.equal(net.layer.bias, bias)
    monkeypatch.setattr("fastlip.norms._models.restore.MOST_COPIED", 1)
    for call in (lipschitz_bound, fastlip.layer_norms):
        with pytest.raises(ValueError, match=r"writes into its parameter layer\.bias"):
            call(Writing(), (3,), check=False)


def test_wrappers_with_hooks_are_refused() -> None:
    wrapped = nn.DataParallel(scaled())
    wrapped.register_forward_hook(lambda module, args, output: 100.0 * output)
    for call in (lipschitz_bound, fastlip.layer_norms):
        with pytest.raises(ValueError, match="DataParallel has hooks on its forward pass"):
            call(wrapped, (3,))


def test_rules_that_are_too_small_are_found_out() -> None:
    class Thrice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * x.clamp(-1e6, 1e6)

    class Steep(nn.Module):
        """Steep only near 0, where two random samples hardly ever are."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.abs() < 1e-3, 100.0 * x, x + 0.099 * x.sign())

    fastlip.lipschitz.rule(Thrice)(lambda module, shape: 2.0)
    fastlip.lipschitz.rule(Steep)(lambda module, shape: 1.0)
    with pytest.raises(ValueError, match=r"does not hold: from 0 to 1 \(Thrice\) two inputs .* report"):
        lipschitz_bound(nn.Sequential(nn.ReLU(), Thrice()), (3,))
    assert lipschitz_bound(nn.Sequential(nn.ReLU(), Thrice()), (3,), check=False).upper == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"does not hold: .* report"):
        lipschitz_bound(nn.Sequential(Steep()), (300,))


def test_rules_may_return_more_than_the_map_but_then_it_is_not_folded() -> None:
    """A Diagonal of the right norm must not be multiplied into a neighbour as if it were the map."""

    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1)

    fastlip.lipschitz.rule(Flip)(lambda module, shape: fastlip.lipschitz.Diagonal(torch.tensor([2.0, 1.0])))
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 3.0])))
    assert lipschitz_bound(nn.Sequential(layer, Flip()), (2,)).upper == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_dtype_agree_with_themselves(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(True),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    ).to(dtype)  # fmt: skip
    assert lipschitz_bound(model, (3, 8, 8)).upper > 0.0
    assert len(fastlip.layer_norms(model, (3, 8, 8))) == 4


def test_models_that_take_one_dtype_only_are_compared_in_it() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise RuntimeError("expected float32")
            return 5.0 * x

    fastlip.lipschitz.rule(Single)(lambda module, shape: 5.0)
    model = nn.Sequential(scaled(), Single())
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(5.0)
    model[0].register_forward_hook(lambda module, args, output: 1.5 * output)
    with pytest.raises(ValueError, match=r"at 0 \(Linear\)"):
        lipschitz_bound(model, (3,))


class Upward(nn.Module):
    """One transposed convolution with two output sizes, whose maps have different norms."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, bias=False)
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.weight[0, 0, 2, 2] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.up(x, output_size=[1, 1]), self.up(x, output_size=[2, 2])
        return torch.cat([small.flatten(1), 10.0 * large.flatten(1)], 1)


def test_one_layer_with_two_output_sizes_has_two_norms() -> None:
    model = Upward()
    assert model(torch.ones(1, 1, 1, 1)).norm().item() == pytest.approx(10.0)
    assert lipschitz_bound(model, (1, 1, 1)).upper == pytest.approx(10.0)
    assert [i.upper for i in fastlip.layer_norms(model, (1, 1, 1)).values()] == pytest.approx([0.0, 1.0])


class Assigned(nn.Module):
    """Runs its layer with a weight that forward puts there."""

    def __init__(self, factor: float, by: str) -> None:
        super().__init__()
        self.layer, self.other, self.by = scaled(), scaled(factor), by

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "data":
            self.layer.weight.data = self.other.weight.data
        elif self.by == "copy":
            self.layer.weight.data.copy_(self.other.weight.data)
        else:
            self.layer.weight = self.other.weight
        return self.layer(x)


@pytest.mark.parametrize("by", ["data", "copy", "parameter"])
def test_weights_that_forward_puts_in_place_are_each_models_own(by: str) -> None:
    models = [Assigned(2.0, by), Assigned(5.0, by)]
    together = fastlip.layer_norms(models, (3,))
    assert [report["layer"].upper for report in together] == pytest.approx([2.0, 5.0])
    for model in models:
        assert torch.equal(model.layer.weight, torch.eye(3))


def test_a_layer_left_in_training_mode_is_found_in_every_model() -> None:
    models = [nn.Sequential(scaled(), nn.BatchNorm1d(3)).eval() for _ in range(2)]
    models[1][1].train()
    with pytest.raises(ValueError, match=r"module 1 .* is in training mode"):
        fastlip.layer_norms(models, (3,))


def test_a_mode_without_effect_is_left_alone() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare, self.nothing = scaled(), nn.BatchNorm1d(3), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.nothing(self.layer(x))

    model = Spare().eval()
    model.spare.train()
    model.nothing.train()
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(1.0)
    assert fastlip.layer_norms(model, (3,))["layer"].upper == pytest.approx(1.0)


def dead(hook: Callable[..., object]) -> nn.Module:
    """The hooked layer gets zeros from every input of ordinary size."""
    model = nn.Sequential(scaled(), nn.ReLU(), scaled())
    model[0].bias = nn.Parameter(torch.full((3,), -5e3))
    model[2].register_forward_hook(hook)
    return model


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: 30.0 * output,
        lambda module, args, output: torch.where(output > 1e9, 100.0 * output, output),
        lambda module, args, output: output.mul_(30.0) and None,
    ],
    ids=["everywhere", "far away", "in place"],
)
def test_hooks_are_found_where_the_model_never_shows_them(hook: Callable[..., object]) -> None:
    def quiet(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> object:
        try:
            return hook(module, args, output)
        except RuntimeError:  # the truth of a tensor, after it was written to
            return None

    with pytest.raises(ValueError, match=r"hooks? on 2 \(Linear\)"):
        lipschitz_bound(dead(quiet), (3,))


def test_margins_take_only_rows_of_the_map_itself() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(1) * torch.tensor([1.0, -1.0])

    fastlip.lipschitz.rule(Shifted)(lambda module, shape: fastlip.norms.Operator(torch.ones(2, 3)))
    layer = Shifted(3, 2)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    assert lipschitz_bound(nn.Sequential(layer), (3,)).log10_margin > math.log10(math.sqrt(3.0))


def test_rules_of_ones_own_may_not_fit() -> None:
    class Biased(nn.Module):
        def forward(self, x: Tensor, more: float) -> Tensor:
            return x + more

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Biased()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, 2.0)

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return 2.0 * x

    fastlip.lipschitz.rule(Biased)(lambda module, shape: fastlip.norms.Operator(torch.eye(3)))
    fastlip.lipschitz.rule(Narrow)(lambda module, shape: fastlip.lipschitz.Diagonal(torch.full((7,), 2.0)))
    assert lipschitz_bound(Once(), (3,)).upper == pytest.approx(1.0)
    assert lipschitz_bound(nn.Sequential(scaled(), Narrow()), (3,)).upper == pytest.approx(2.0)


@pytest.mark.parametrize("head", [nn.Identity(), nn.Flatten(), nn.Unflatten(1, (1, 3))], ids=["alone", "flat", "apart"])
def test_models_that_lose_the_batch_axis_of_one_sample(head: nn.Module) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pool, self.head = nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.layer(x)).squeeze())

    assert lipschitz_bound(Squeezed(), (2, 6, 6)).upper > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-9, 1e-16, 1e-17])
def test_rounding_beside_a_tiny_layer_refutes_nothing(dtype: torch.dtype, scale: float) -> None:
    """Outputs of such a layer differ by the rounding of its bias, which later layers amplify."""
    for seed in range(10):
        torch.manual_seed(seed)
        tiny = nn.Linear(8, 8, dtype=dtype)
        with torch.no_grad():
            tiny.weight.mul_(scale)
        model = nn.Sequential(nn.Linear(8, 8, dtype=dtype), nn.ReLU(), tiny, nn.Tanh(), nn.Linear(8, 4, dtype=dtype))
        assert lipschitz_bound(model, (8,)).upper < 1e-6


@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr, lambda t: t * 1j, lambda t: t > 0])
@pytest.mark.parametrize("call", [lipschitz_bound, fastlip.layer_norms])
def test_buffers_of_every_kind_are_left_alone(convert: Callable[[Tensor], Tensor], call: Callable[..., object]) -> None:
    model = nn.Sequential(scaled())
    model.register_buffer("mask", convert(torch.eye(3)))
    mask = model.mask
    call(model, (3,))
    assert model.mask is mask
    assert torch.equal(mask.to_dense() if mask.layout != torch.strided else mask, convert(torch.eye(3)).to_dense())


def test_compiled_and_lazy_models() -> None:
    model = nn.Sequential(scaled(3.0), nn.ReLU())
    model.compile()
    compiled = model._compiled_call_impl
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(3.0)
    assert fastlip.layer_norms(model, (3,))["0"].upper == pytest.approx(3.0)
    assert model._compiled_call_impl is compiled
    for call in (lipschitz_bound, fastlip.layer_norms):
        with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run a lazy model once"):
            call(nn.Sequential(nn.LazyLinear(3)), (3,))


def test_backward_hooks_are_not_run() -> None:
    model = nn.Sequential(scaled(), nn.Tanh(), scaled())
    seen: list[int] = []
    model[1].register_full_backward_hook(lambda module, entering, leaving: seen.append(1))
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(1.0)
    assert seen == []
    model(torch.ones(1, 3)).sum().backward()
    assert seen == [1]


class Everything(nn.Module):
    """Writes past every counter: through .data, into arrays, generators, tuples, sizes and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = scaled()
        self.register_buffer("counted", torch.zeros(3))
        self.register_buffer("grown", torch.zeros(2))
        self.signed = nn.Parameter(torch.zeros(2))
        self.array, self.generator = np.zeros(2), torch.Generator().manual_seed(0)
        self.pair = (torch.zeros(1), [torch.zeros(1)])

    def forward(self, x: Tensor) -> Tensor:
        self.counted.data.add_(1.0)
        self.grown.resize_(5)
        self.layer.weight.data.clamp_(max=0.5)
        self.signed.data.mul_(-1.0)
        self.layer.weight.requires_grad_(False)
        self.array += 1.0
        torch.rand(1, generator=self.generator)
        self.pair[0].add_(1.0)
        self.pair[1][0].add_(1.0)
        random.random()
        np.random.rand()  # noqa: NPY002, what is to be put back
        return self.layer(x)


@pytest.mark.parametrize("call", [lipschitz_bound, fastlip.layer_norms])
def test_what_no_counter_shows_is_put_back(call: Callable[..., object]) -> None:
    net = Everything()
    states = random.getstate(), str(np.random.get_state()), net.generator.get_state()  # noqa: NPY002
    with contextlib.suppress(ValueError):
        call(net, (3,))
    assert torch.equal(net.layer.weight, torch.eye(3))
    assert net.layer.weight.requires_grad
    assert torch.equal(net.counted, torch.zeros(3))
    assert torch.equal(net.grown, torch.zeros(2))
    assert not torch.signbit(net.signed).any()
    assert net.array.tolist() == [0.0, 0.0]
    assert net.pair[0].item() == net.pair[1][0].item() == 0.0
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002
    assert torch.equal(net.generator.get_state(), states[2])


def test_an_interrupted_call_leaves_the_model_as_it_was() -> None:
    net, runs, stop = Memory().train(), 0, 0
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def forward(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == stop:
            raise KeyboardInterrupt
        return Memory.forward(net, x)

    for stop in range(1, 12):  # noqa: B007, the forward reads it
        runs = 0
        vars(net)["forward"] = forward
        with contextlib.suppress(KeyboardInterrupt, ValueError):
            lipschitz_bound(net, (3,))
        del vars(net)["forward"]
        assert net.training
        assert net.layer.weight.dtype == torch.float32
        assert net.trail == []
        assert not net.layer._forward_hooks
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name])
    assert runs >= 5


def test_deeply_nested_branches_are_bounded() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            skips = [x]
            for _ in range(300):
                skips.append(0.5 * skips[-1])
            while len(skips) > 1:
                last = skips.pop()
                skips[-1] = skips[-1] + last
            return skips[0]

    assert lipschitz_bound(Nested(), (2,)).upper == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.flatten(x, 5), "does not run on an input"),
        (lambda x: x.mean(5), "does not run on an input"),
        (lambda x: F.hardtanh(x, 0.0, 0.0), "no Lipschitz rule for hardtanh with these arguments|does not run"),
        (lambda x: x * 1j, "a factor that is complex"),
    ],
)
def test_errors_of_torch_become_ours(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(ByBatch(function), (3,))


def test_small_activations_of_half_precision_agree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).half()
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(0.01)
    assert len(fastlip.layer_norms(model, (8,))) == 3
