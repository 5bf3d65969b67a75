"""Small networks as one function: which models become one, and that it is the model's."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastlip import attacks, ops
from fastlip.attacks import _interleaved, _prepare
from fastlip.attacks._interleaved import OneFunction, SmallNetwork
from fastlip.attacks._packed import PackedConv
from fastlip.attacks._prepare import network_of
from fastlip.attacks._recipe import Remade

pytestmark = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="only the compiled library packs")


def body(channels=(3, 8, 16), stride=2):
    return [part for a, b in itertools.pairwise(channels) for part in (nn.Conv2d(a, b, 3, stride, 1), nn.ReLU())]


def sequential(*head, channels=(3, 8, 16)):
    return nn.Sequential(*body(channels), *head)


class Written(nn.Module):
    """A model whose forward makes vectors of maps in one of the usual ways."""

    def __init__(self, flatten):
        super().__init__()
        self.body = nn.Sequential(*body())
        self.hidden, self.drop, self.last = nn.Linear(16 * 16, 20), nn.Dropout(0.5), nn.Linear(20, 5)
        self.flatten = flatten

    def forward(self, x):
        x = self.flatten(self.body(x))
        return self.last(self.drop(functional.relu(self.hidden(x))))


WHOLE = {
    "modules": lambda: sequential(nn.Flatten(), nn.Linear(256, 5)),
    "a dropout": lambda: sequential(nn.Flatten(), nn.Dropout(), nn.Linear(256, 9), nn.ReLU(), nn.Linear(9, 5)),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ),
    "no bias": lambda: nn.Sequential(nn.Conv2d(3, 4, 5, 3, bias=False), nn.Flatten(), nn.Linear(64, 5, bias=False)),
    "view(size)": lambda: Written(lambda x: x.view(x.size(0), -1)),
    "view(shape)": lambda: Written(lambda x: x.view(x.shape[0], -1)),
    "reshape(shape)": lambda: Written(lambda x: x.reshape(x.shape[0], -1)),
    "torch.flatten": lambda: Written(lambda x: torch.flatten(x, 1)),
    "start_dim": lambda: Written(lambda x: torch.flatten(x, start_dim=1)),
    "flatten method": lambda: Written(lambda x: x.flatten(1)),
}


def problem(model, batch=5, size=16):
    torch.manual_seed(0)
    model = model().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model, torch.rand(batch, 3, size, size)


def copy_of(model, x):
    return network_of(model, x, fast=True, precision=None, however_small=True).faster


def small_networks(made):
    return [m for m in made.model.modules() if isinstance(m, SmallNetwork)]


def interleaved(small):
    """The layers that have become one function, for each size that has come."""
    return [way[0].interleaved for way in small.ways.values() if isinstance(way[0], OneFunction)]


def check(made, model, x):
    seen = x.clone().requires_grad_()
    want = model(seen)
    weights = torch.linspace(-1, 1, want.numel()).view(want.shape)
    (wanted,) = torch.autograd.grad((want * weights).sum(), seen)
    found = made(other := x.clone().requires_grad_())
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), other)[0], wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(made(x), found)


@pytest.mark.parametrize("name", WHOLE)
def test_models_that_become_one_function(name):
    model, x = problem(WHOLE[name])
    made = copy_of(model, x)
    (small,) = small_networks(made)
    (layers,) = interleaved(small)
    linear = sum(type(m) is nn.Linear for m in model.modules())
    assert len(layers.layers) == linear + sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert not [n for n in made.model.graph.nodes if n.op == "call_function" and n.target is not getattr and n.users]
    for batch in (1, 5, 23):
        check(made, model, torch.rand(batch, *x.shape[1:]))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8 * 256, 5)

    def forward(self, x):
        y = self.first(x).relu()
        return self.last((self.second(y).relu() + y).flatten(1))


class Reads(nn.Module):
    """Maps that something else reads as well."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Sequential(*body()), nn.Linear(256, 5)

    def forward(self, x):
        maps = self.body(x)
        return self.last(maps.flatten(1)) + maps.mean((1, 2, 3))[:, None]


def test_networks_of_more_channels_and_branches_stay_chains():
    for make in (
        lambda: sequential(nn.Flatten(), nn.Linear(32 * 16, 5), channels=(3, 32, 32)),
        Branching,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, ceil_mode=True), nn.Flatten(), nn.Linear(200, 5)),
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(6 * 196, 5)),
    ):
        model, x = problem(make)
        made = copy_of(model, x)
        assert not small_networks(made)
        check(made, model, x)


def test_layers_behind_that_are_not_part_of_it():
    """The maps alone are interleaved where they are read in another way."""
    for make in (
        Reads,
        lambda: sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(256, 5)),
        lambda: sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)),
        lambda: sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Flatten(), nn.Linear(256, 5)),
        lambda: sequential(nn.AvgPool2d(2, divisor_override=3), nn.Flatten(), nn.Linear(64, 5)),
        lambda: sequential(nn.BatchNorm2d(16, affine=False), nn.Flatten(), nn.Linear(256, 5)),
        lambda: sequential(nn.Conv2d(16, 5, 4), nn.Flatten()),
        lambda: sequential(nn.Flatten(), nn.Tanh(), nn.Linear(256, 5)),
        lambda: sequential(nn.Flatten(), nn.Flatten(), nn.Linear(256, 5)),
    ):
        model, x = problem(make)
        made = copy_of(model, x)
        (small,) = small_networks(made)
        assert len(small.parts) == 1
        assert interleaved(small)
        check(made, model, x)


class Pooled(nn.Module):
    """Pools as functions, and ReLUs behind them."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3), nn.Linear(8 * 9, 5)
        self.pool = pool

    def forward(self, x):
        x = functional.relu(self.pool(self.first(x)))
        x = self.pool(self.second(x).relu())
        return self.last(x.flatten(1))


class Global(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Sequential(*body()), nn.Linear(16, 5)

    def forward(self, x):
        return self.last(functional.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


POOLED = {  # models, and how many layers become one function
    "max": (lambda: Pooled(lambda x: functional.max_pool2d(x, 2)), 5),
    "max, torch": (lambda: Pooled(lambda x: torch.max_pool2d(x, (2, 2), (2, 2))), 5),
    "max, all arguments": (lambda: Pooled(lambda x: functional.max_pool2d(x, 3, 2, 1, 1, ceil_mode=False)), 5),
    "average": (lambda: Pooled(lambda x: functional.avg_pool2d(x, kernel_size=2, stride=2)), 5),
    "global": (Global, 4),
    "modules": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 9, 3), nn.AvgPool2d(2, 1, 1), nn.ReLU(),
            nn.Dropout2d(), nn.Conv2d(9, 10, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
            nn.Linear(10, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 3),
        ),
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLED)
def test_networks_with_pools(name):
    make, layers = POOLED[name]
    model, x = problem(make)
    made = copy_of(model, x)
    (small,) = small_networks(made)
    (found,) = interleaved(small)
    assert len(found.layers) == layers
    assert not [n for n in made.model.graph.nodes if n.op == "call_function"]
    for batch in (1, 6, 20):
        check(made, model, torch.rand(batch, *x.shape[1:]))


def test_pools_that_pytorch_refuses_are_refused():
    model, x = problem(lambda: sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(64, 5)))
    made = copy_of(model, x)
    (small,) = small_networks(made)
    small.parts[1].padding = 2
    small.ways.clear()
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        made(x)


def test_maps_of_sizes_on_which_it_would_not_be_faster(monkeypatch):
    model, x = problem(lambda: sequential(nn.Conv2d(16, 4, 3, 1, 1)))
    pooled = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    made = copy_of(pooled, x)
    (small,) = small_networks(made)
    monkeypatch.setattr(_interleaved, "_MOST_ELEMENTS", 2000)
    large = torch.rand(3, 3, 32, 30)
    check(made, pooled, large)
    assert not isinstance(small.ways[32, 30][0], OneFunction)
    check(made, pooled, torch.rand(3, 3, 15, 13))
    check(made, pooled, x)
    assert list(small.ways) == [(16, 16), (32, 30), (15, 13)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, 64, 7, padding=3), nn.Flatten()),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=65), nn.ReLU(), nn.Conv2d(4, 5, 100), nn.Flatten()),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=8), nn.ReLU(), nn.Conv2d(4, 5, 17), nn.Flatten()),
    ],
)
def test_layers_that_are_too_large(make):
    model, x = problem(make)
    made = copy_of(model, x)
    (small,) = small_networks(made)
    assert not interleaved(small)
    check(made, model, x)


@pytest.mark.parametrize(
    ("head", "own"),
    [
        (lambda: [nn.Flatten(), nn.Linear(256, 1100), nn.ReLU(), nn.Linear(1100, 5)], 2),
        (lambda: [nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, 14000)], 3),
        (lambda: [nn.Upsample(scale_factor=6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)], 2),
        (lambda: [nn.MaxPool2d(2), nn.Conv2d(16, 5, 17, padding=8), nn.AdaptiveAvgPool2d(1), nn.Flatten()], 3),
    ],
)
def test_what_comes_before_a_layer_that_is_too_large(head, own):
    model, x = problem(lambda: sequential(*head()))
    made = copy_of(model, x)
    small = small_networks(made)[0]
    (layers,) = interleaved(small)
    assert len(layers.layers) == own
    for batch in (1, 5, 20):
        check(made, model, torch.rand(batch, *x.shape[1:]))


@pytest.mark.parametrize("place", [4, 5, 6, 7])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_layers_with_hooks_stay_as_they_are(hook, place):
    """What a hook changes, on other images than those that were compared, is what the model computes."""
    model, x = problem(lambda: sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 5)), batch=12)
    limit = model(x[:4]).abs().max() + 0.5
    changes = {
        "register_forward_hook": lambda module, given, out: out.clamp(max=limit),
        "register_forward_pre_hook": lambda module, given: (given[0].clamp(max=limit),),
        "register_full_backward_hook": lambda module, grads, out: (grads[0].clamp(min=0),),
    }
    getattr(model[place], hook)(changes[hook])
    made = copy_of(model, x)
    (small,) = small_networks(made)
    assert len(small.parts) <= place - 3
    check(made, model, 5 * torch.rand(7, *x.shape[1:]))


class InPlace(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.body, self.change = sequential(nn.Flatten(), nn.Linear(256, 5)), change

    def forward(self, x):
        return self.change(self.body(x))


@pytest.mark.parametrize(
    "change", [lambda y: y.div_(2.0), lambda y: y.sub_(y.mean(1, keepdim=True)), lambda y: y + y.relu_()]
)
def test_what_comes_out_may_be_written_into(change):
    model, x = problem(lambda: InPlace(change))
    made = copy_of(model, x)
    assert len(small_networks(made)) == 1
    check(made, model, x)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: functional.avg_pool2d(x, (2,)), lambda x: functional.max_pool2d(x, [2]),
        lambda x: functional.max_pool2d(x, 2, [2], (0, 0), 1), nn.MaxPool2d([2]),
    ],
)  # fmt: skip
def test_one_number_in_brackets_is_for_both_sides(pool):
    model, x = problem(lambda: Pooled(pool))
    made = copy_of(model, x)
    assert len(interleaved(small_networks(made)[0])[0].layers) == 5
    check(made, model, x)


def test_weights_that_another_thread_packs_meanwhile(monkeypatch):
    """On maps of another size they are packed, and no longer there as they were."""
    model, x = problem(lambda: sequential(nn.Conv2d(16, 4, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    made = copy_of(model, x)
    (small,) = small_networks(made)
    is_filtered = PackedConv.is_filtered

    def meanwhile(self, size):
        if self.plain is not None and not self.few:
            self._pack(self.plain, filtered=False)
        return is_filtered(self, size)

    monkeypatch.setattr(PackedConv, "is_filtered", meanwhile)
    check(made, model, torch.rand(3, 3, 12, 12))
    check(made, model, torch.rand(3, 3, 14, 12))
    assert not isinstance(small.ways[14, 12][0], OneFunction)


def test_errors_are_the_models():
    model, x = problem(WHOLE["modules"])
    made = copy_of(model, x)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        made(torch.rand(2, 3, 32, 32))


def test_an_image_does_not_depend_on_its_batch():
    model, x = problem(WHOLE["modules"], batch=37)
    made = copy_of(model, x)
    for rows in (slice(0, 1), slice(4, 12), slice(9, 26)):
        assert torch.equal(made(x[rows]), made(x)[rows])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_attacks_find_what_they_find_on_the_model(attack, norm):
    model, x = problem(WHOLE["a dropout"], batch=40)
    for parameter in model.parameters():
        parameter.data.mul_(2 if parameter.dim() > 1 else 0)  # so that classes differ between images
    labels = model(x).argmax(1)
    eps = {"linf": 0.0125, "l2": 0.2, "l1": 2.0}[norm]
    made = attacks.prepare(model, x, fast=True)
    assert small_networks(made.faster)
    for loss in ("ce", "dlr"):
        fooled = [
            (model(attack(m, x, labels, norm=norm, eps=eps, loss=loss, random_start=False)).argmax(1) != labels)
            for m in (model, made)
        ]
        assert 0 < fooled[0].sum() < len(x)
        assert (fooled[0] != fooled[1]).sum() <= 2


def trained_on(model):
    """What a step of training does to weights and statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.01)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1)
                module.running_var.mul_(1.2)


@pytest.mark.parametrize("name", [*WHOLE, *POOLED])
def test_copies_in_training_are_made_without_tracing(name, monkeypatch):
    make = WHOLE[name] if name in WHOLE else POOLED[name][0]
    model, x = problem(make)
    network_of(model, x, fast=True, precision=None)
    monkeypatch.setattr(_prepare, "_traced", None)  # not to be called
    for _ in range(3):
        trained_on(model)
        made = network_of(model, x, fast=True, precision=None).faster
        assert isinstance(made.model, Remade)
        assert made.keeps_nothing
        for batch in (1, 5, 23):
            check(made, model, torch.rand(batch, *x.shape[1:]))
    again = network_of(model, x, fast=True, precision=None).faster
    assert again is made, "the weights are the same"


def test_copies_for_images_of_any_size_are_traced():
    """What is prepared may be attacked on images of other sizes."""
    pooled, x = problem(Global)
    network_of(pooled, x, fast=True, precision=None)
    trained_on(pooled)
    assert isinstance(network_of(pooled, x, fast=True, precision=None).faster.model, Remade)
    network = attacks.prepare(pooled, x, fast=True)
    assert small_networks(network.faster)
    trained_on(pooled)
    larger = torch.rand(3, 3, 24, 20)
    labels = pooled(larger).argmax(1)
    with pytest.warns(attacks.AttackWarning, match="prepared again"):
        attacks.pgd(network, x, pooled(x).argmax(1), eps=0.01, steps=2)
    check(network.faster, pooled, larger)
    attacks.pgd(network, larger, labels, eps=0.01, steps=2)
    assert isinstance(network_of(pooled, larger, fast=True, precision=None).faster.model, _prepare.fx.GraphModule)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.factor = WHOLE["modules"](), 1.0

    def forward(self, x):
        return self.model(x * self.factor)


class Adapted(nn.Conv2d):
    """With a change of low rank, 0 to begin with, and learned."""

    def __init__(self, conv):
        super().__init__(8, 16, 3, 2, 1)
        self.load_state_dict(conv.state_dict())
        self.down, self.up = torch.randn(8, 72) * 0.1, torch.zeros(16, 8)

    def forward(self, x):
        return super().forward(x) + functional.conv2d(x, (self.up @ self.down).view_as(self.weight), None, 2, 1)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("change", ["hook", "gradient", "patched", "adapter", "slope"])
def test_changes_of_other_images_or_of_the_gradient_alone(change, trains):
    """With and without new weights, for several attacks."""
    model, x = problem(lambda: sequential(nn.Flatten(), nn.Linear(256, 5)))
    for _ in range(2):
        check(network_of(model, x, fast=True, precision=None).faster, model, x)
        trained_on(model)
    if change == "hook":
        model[3].register_full_backward_hook(lambda module, grads, out: (0.2 * grads[0],))
    elif change == "gradient":
        model[3] = Straight()
    elif change == "patched" and trains:
        model[3].forward = lambda x: x.relu() * 0.5 + x.relu().detach() * 0.5
    elif change == "adapter":
        model[2] = Adapted(model[2])
    elif change == "slope":
        model[3] = nn.LeakyReLU(1e-4)
    for _ in range(3):
        if trains:
            trained_on(model)
        if change == "adapter":
            model[2].up += 2e-4 * torch.randn(16, 8)
        made = network_of(model, x, fast=True, precision=None).faster
        if made is not None:
            check(made, model, 3 * torch.rand(7, *x.shape[1:]))


class Straight(nn.Module):
    """A ReLU with another gradient."""

    def forward(self, x):
        return x.relu() * 0.5 + x.relu().detach() * 0.5


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (28, 28), (17, 34), (64, 6), (19, 17)])
def test_means_over_large_maps(size):
    """As means of means, where a side is no larger prime."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    ).eval()
    x = torch.rand(5, 3, *size)
    made = copy_of(model, x)
    (small,) = small_networks(made)
    primes = [side for side in size if side in (17, 19, 34)]
    assert bool(interleaved(small)) == (not primes)
    for batch in (1, 18):
        check(made, model, torch.rand(batch, 3, *size))


def test_a_recipe_is_for_images_of_one_size(monkeypatch):
    """For others the network counts as what it was: too small for a copy in training."""
    model, x = problem(Global)
    monkeypatch.setattr(_prepare, "_LEAST_MULTIPLY_ADDS", 1e5)
    assert network_of(model, x, fast=True, precision=None).faster is not None
    trained_on(model)
    assert isinstance(network_of(model, x, fast=True, precision=None).faster.model, Remade)
    trained_on(model)
    assert network_of(model, torch.rand(5, 3, 20, 20), fast=True, precision=None).faster is None
    assert isinstance(network_of(model, x, fast=True, precision=None).faster.model, Remade)


@pytest.mark.parametrize("change", ["number", "hook", "hook of a container", "class"])
def test_changes_that_the_compared_images_do_not_show(change):
    model, x = problem(Scaled)
    network_of(model, x, fast=True, precision=None)
    for step in range(3):
        trained_on(model)
        if step == 1 and change == "number":
            model.factor = 1.0 + 1e-7
        elif step == 1 and change == "class":
            model.model[1].__class__ = type("Other", (nn.ReLU,), {})
        elif step == 1:
            hooked = model.model[2] if change == "hook" else model.model
            hooked.register_forward_hook(lambda module, given, out: out.clamp(max=1e3))
        made = network_of(model, x, fast=True, precision=None).faster
        check(made, model, torch.rand(7, *x.shape[1:]))
        assert step == 2 or isinstance(made.model, Remade) == (step == 0)


@pytest.mark.parametrize("change", ["stride", "layer", "more layers", "activation"])
def test_a_model_of_another_structure_is_traced_anew(change):
    model, x = problem(lambda: sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))
    network_of(model, x, fast=True, precision=None)
    trained_on(model)
    if change == "stride":
        model[2].stride = (1, 1)
    elif change == "layer":
        model[2] = nn.Conv2d(8, 16, 5, padding=2)
    elif change == "more layers":
        model.append(nn.Linear(5, 3))
    else:
        model[1] = nn.Tanh()
    made = network_of(model, x, fast=True, precision=None).faster
    assert not isinstance(made.model, Remade)
    check(made, model, x)


def test_recipes_hold_no_model():
    model, x = problem(WHOLE["batch norm"])
    network_of(model, x, fast=True, precision=None)
    trained_on(model)
    network_of(model, x, fast=True, precision=None)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


class Normalised(nn.Module):
    def __init__(self, model, also_read):
        super().__init__()
        self.model, self.also_read = model, also_read
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("deviation", torch.rand(3, 1, 1) + 0.5)

    def forward(self, x):
        y = (x - self.mean) / self.deviation
        return self.model(y) + y.amax((1, 2, 3))[:, None] if self.also_read else self.model(y)


@pytest.mark.parametrize(
    ("channels", "also_read", "as_given"),
    [((3, 8, 16), False, True), ((3, 8, 16), True, False), ((3, 20, 24), False, False)],
)
def test_images_that_are_normalised_keep_their_memory_format(channels, also_read, as_given):
    """Converting them to channels_last and back would take longer than a layer."""
    head = nn.Linear(channels[-1] * 16, 5)
    model, x = problem(lambda: Normalised(sequential(nn.Flatten(), head, channels=channels), also_read))
    made = copy_of(model, x)
    assert (made.memory_format == torch.preserve_format) == as_given
    for layout in (torch.contiguous_format, torch.channels_last):
        check(made, model, torch.rand(7, 3, 16, 16).contiguous(memory_format=layout))


@pytest.mark.parametrize("name", ["modules", "batch norm"])
def test_copies_of_models_that_normalise_are_made_without_tracing(name, monkeypatch):
    """With the mean and the deviation as they are by then."""
    model, x = problem(lambda: Normalised(WHOLE[name](), also_read=False))
    network_of(model, x, fast=True, precision=None)
    with monkeypatch.context() as patched:
        patched.setattr(_prepare, "_traced", None)
        for _ in range(2):
            trained_on(model)
            model.mean.add_(0.1)
            model.deviation = model.deviation * 1.1
            made = network_of(model, x, fast=True, precision=None).faster
            assert isinstance(made.model, Remade)
            for own in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                check(own, model, torch.rand(7, *x.shape[1:]))
    model.also_read = True
    trained_on(model)
    made = network_of(model, x, fast=True, precision=None).faster
    assert not isinstance(made.model, Remade)
    check(made, model, x)
