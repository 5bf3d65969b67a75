"""Small networks as one function: which models become one, and that it is the model's."""

import pytest
import torch
from small_models import (
    POOLED,
    WHOLE,
    Normalised,
    Pooled,
    body,
    check,
    copy_of,
    interleaved,
    problem,
    sequential,
    small_networks,
)
from torch import nn
from torch.nn import functional

from fastlip import attacks, ops
from fastlip.attacks import _interleaved
from fastlip.attacks._interleaved import OneFunction
from fastlip.attacks._packed import PackedConv

pytestmark = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="only the compiled library packs")


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
