"""Replayed iterations: the same results as the loop's own, in memory that has a bound.

Without a GPU a stand-in "replays" by carrying out the recorded iteration again, on the same memory.
"""

import copy
import itertools
import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import attacks
from fastlip.attacks import _loop
from fastlip.attacks._graphs import CudaCapture, IterationGraphs, roomy_size

EPS = {"linf": 0.02, "l2": 0.15, "l1": 0.6}
#: What makes the host wait for the device.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


class Again:
    """Carries an iteration out instead of recording it, twice as a warm-up and then for each replay."""

    def __init__(self, each=0, most=1 << 30):
        self.each, self.most = each, most
        self.made = self.released = 0
        self.operators = []

    def __call__(self, iterate, device):
        self.made += 1
        for _ in range(2):
            with Seen() as seen:
                iterate()
            self.operators.append(seen.names)
        return iterate

    def budget(self, device):
        return self.most

    def bytes(self):
        return self.each * (self.made > self.released)

    def release(self):
        self.released = self.made


class Fails(Again):
    def __call__(self, iterate, device):
        super().__call__(iterate, device)
        raise RuntimeError("no capture here")


@pytest.fixture(autouse=True)
def looks_every_four_steps(monkeypatch):
    """As on a GPU, for images that wait to be confirmed wait for a look."""
    monkeypatch.setattr(_loop, "_CHECK_EVERY", {"cpu": 4})


@pytest.fixture(scope="module")
def problem():
    """Scores whose rounding does not depend on the batch, and images that half of the attacks below change."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.weight = nn.Parameter(torch.randn(5, 60, generator=generator))

        def forward(self, x):
            return (x.flatten(1)[:, None].double() * self.weight.double()).sum(2).sin().to(self.weight.dtype)

    model = Scores()
    inputs = 0.5 + 0.1 * torch.randn(41, 3, 4, 5, generator=torch.Generator().manual_seed(4))
    return model, inputs, model(inputs).argmax(1).detach()


def replaying(model, capture=None, copy=None, **options):
    graphs = IterationGraphs(Again() if capture is None else capture, **options)
    return attacks.Network(model, copy or (lambda x: model(x)), 1e-6, graphs=graphs)


def plain(model, copy=None):
    return attacks.Network(model, copy or (lambda x: model(x)), 1e-6)


def call_of(seed, inputs, labels, device="cpu"):
    """A random attack with random settings."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    norm = r.choice(list(EPS))
    eps = EPS[norm] * r.choice([0.3, 1, 3])
    call = {
        "norm": norm,
        "eps": eps
        if r.random() < 0.6
        else (eps * torch.rand(len(inputs), generator=g, dtype=torch.float64)).to(device),
        "steps": r.choice([5, 9, 14]),
        "loss": r.choice(["dlr", "ce", "margin"]),
        "keep": r.choice(["best", "best", "last"]),
        "early_stop": r.random() < 0.8,
        "random_start": r.random() < 0.5,
    }
    if call["random_start"]:
        call |= {"restarts": r.choice([1, 2]), "generator": torch.Generator(device).manual_seed(seed)}
    if r.random() < 0.3:
        call["targets"] = (labels + 1) % 5
    if r.random() < 0.3:
        call["bounds"] = ((inputs.float() - 0.1 * eps).clamp_min(-9), torch.full((3, 1, 1), 9.0, device=device))
    else:
        call["bounds"] = (-9.0, 9.0)
    if r.random() < 0.3:
        call["active"] = (torch.rand(len(inputs), generator=g) < 0.7).to(device)
    attack = r.choice([attacks.pgd, attacks.apgd])
    if attack is attacks.apgd and "targets" not in call and r.random() < 0.4:
        call["target_classes"] = 2
    return attack, call


def same_results(seed: int, network: Callable, reference: Callable, inputs, labels, device="cpu"):
    found = []
    for one in (network, reference):
        attack, call = call_of(seed, inputs, labels, device)
        found.append(attack(one, inputs, labels, **call))
    assert found[0].dtype == inputs.dtype
    assert torch.equal(*found), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_those_of_the_loop(problem, dtype):
    model, inputs, labels = problem
    network, other = replaying(model), plain(model)
    for seed in range(25):
        size = random.Random(seed).choice([1, 3, 17, 41])
        same_results(seed, network, other, inputs[:size].to(dtype), labels[:size])
    assert network.graphs.replays > 200
    assert network.graphs.alive <= 32


def test_results_are_those_of_the_loop_where_the_copy_claims_too_much(problem):
    """Claims that the model refutes send images on in both."""
    model, inputs, labels = problem

    def copy(x):
        return model(x) + 0.2 * nn.functional.one_hot((10 * x.flatten(1).sum(1)).long() % 5, 5)

    network, other = (make(model, copy=copy) for make in (replaying, plain))
    for seed in range(20):
        same_results(seed, network, other, inputs, labels)
    assert network.graphs.replays > 100


def test_an_exact_network_may_replay_too(problem):
    model, inputs, labels = problem
    network = attacks.Network(model, graphs=IterationGraphs(Again()))
    assert network.exact
    for seed in range(12):
        same_results(seed, network, model, inputs, labels)


def test_recorded_once_for_each_room_and_settings(problem):
    model, inputs, labels = problem
    capture = Again()
    network = replaying(model, capture)
    call = {"steps": 8, "loss": "ce", "keep": "last", "bounds": (-9.0, 9.0), "random_start": False}
    for eps in (0.01, 0.02, torch.rand(41)):
        for shift in (0, 1):
            attacks.pgd(network, inputs, (labels + shift) % 5, eps=eps, **call)
    assert capture.made == network.graphs.captures == network.graphs.alive == 1
    assert network.graphs.replays == 6 * 7, "the first iteration of a call tells which classes there are"
    attacks.pgd(network, inputs[:17], labels[:17], eps=0.1, **call)
    assert network.graphs.alive == 2
    attacks.pgd(network, inputs[:17], labels[:17], eps=0.1, **call | {"loss": "margin"})
    assert network.graphs.alive == 3


def test_an_iteration_never_waits_for_the_device(problem):
    model, inputs, labels = problem
    capture = Again()
    network = replaying(model, capture)
    for norm, attack, loss in itertools.product(EPS, (attacks.pgd, attacks.apgd), ("dlr", "ce")):
        attack(network, inputs, labels, norm=norm, eps=EPS[norm], steps=12, loss=loss, bounds=(-9.0, 9.0))
    assert capture.operators
    for names in capture.operators:
        assert "judge" in names
        assert not set(names) & set(WAITS)


def test_room_wastes_little():
    for size in range(1, 5000):
        room = roomy_size(size, 1 << 20)
        assert size <= room
        assert (room - size) / room <= 0.15
        assert roomy_size(room, 1 << 20) == room
        assert roomy_size(size, size) == size
    assert [roomy_size(n, 1000) for n in (1, 7, 15, 17, 640, 641, 1000)] == [1, 7, 15, 18, 640, 704, 1000]


def test_fallen_images_leave_room(problem):
    """The model sees no more images than the room of those that are left."""
    model, inputs, labels = problem
    sizes = []

    def copy(x):
        sizes.append(len(x))
        return model(x)

    network = replaying(model, copy=copy)
    attacks.pgd(network, inputs, labels, eps=0.05, steps=40, loss="margin", bounds=(-9.0, 9.0))
    assert sizes[0] == 41
    assert len(set(sizes)) > 2
    assert all(roomy_size(n, 41) == n for n in set(sizes[:-1]))
    assert sorted(sizes, reverse=True)[-1] < 20


def test_few_graphs_are_alive(problem):
    model, inputs, labels = problem
    network = replaying(model, most=3)
    for size in (3, 5, 7, 11, 3, 5):
        same_results(size, network, plain(model), inputs[:size], labels[:size])
        assert network.graphs.alive <= 3
    before = network.graphs.bytes
    assert before > 0
    assert "graphs" in repr(network.graphs)
    network.graphs.clear()
    assert network.graphs.alive == network.graphs.bytes == 0
    same_results(1, network, plain(model), inputs, labels)


def test_the_least_recently_used_graph_goes_first(problem):
    model, inputs, labels = problem
    capture = Again()
    network = replaying(model, capture, most=2)

    def attack(loss):
        call = {"eps": 0.01, "steps": 6, "keep": "last", "bounds": (-9.0, 9.0)}
        attacks.pgd(network, inputs, labels, loss=loss, **call)
        return capture.made

    assert [attack(loss) for loss in ("dlr", "ce", "dlr", "margin", "dlr", "ce")] == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("most", [0, 100])
def test_what_takes_too_much_memory_is_not_replayed(problem, most):
    model, inputs, labels = problem
    capture = Again(each=most, most=50)
    network = replaying(model, capture)
    for seed in range(8):
        same_results(seed, network, plain(model), inputs, labels)
        assert network.graphs.alive == network.graphs.bytes == 0
    assert network.graphs.replays == 0
    made = capture.made
    same_results(0, network, plain(model), inputs, labels)
    assert capture.made == made, "what was refused once is not tried again"


def test_memory_stays_within_the_budget(problem):
    """What is new takes the place of what was there before."""
    model, inputs, labels = problem
    attack = {"eps": 0.01, "steps": 6, "keep": "last", "bounds": (-9.0, 9.0)}
    network = replaying(model)
    attacks.pgd(network, inputs, labels, **attack)
    one = network.graphs.bytes
    network = replaying(model, budget=int(1.5 * one))
    for loss in ("dlr", "ce", "margin", "dlr"):
        attacks.pgd(network, inputs, labels, loss=loss, **attack)
        assert 0 < network.graphs.bytes <= 1.5 * one
        assert network.graphs.alive == 1
    assert network.graphs.captures > 4


def test_where_recording_fails_the_loop_goes_on(problem):
    model, inputs, labels = problem
    network = replaying(model, Fails())
    attack, call = attacks.pgd, {"eps": 0.02, "steps": 8, "random_start": False, "bounds": (-9.0, 9.0)}
    with pytest.warns(UserWarning, match="capture failed: no capture here"):
        found = attack(network, inputs, labels, **call)
    assert torch.equal(found, attack(plain(model), inputs, labels, **call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, attack(network, inputs, labels, **call))
    assert network.graphs.alive == network.graphs.replays == 0


def test_a_refusal_stands_until_images_fall(problem, monkeypatch):
    model, inputs, labels = problem
    asked = []

    def refuse(self, settings, iterate, now, steps_left):
        asked.append(len(now))

    monkeypatch.setattr(IterationGraphs, "place", refuse)
    call = {"eps": 0.05, "steps": 40, "loss": "margin", "bounds": (-9.0, 9.0)}
    attacks.pgd(replaying(model), inputs, labels, **call)
    assert 1 < len(asked) == len(set(asked))


def test_passes_are_counted_as_ever(problem):
    model, inputs, labels = problem
    for seed, attack in itertools.product(range(3), (attacks.pgd, attacks.apgd)):
        counted = []
        for make in (replaying, plain):
            network = make(model, copy=copy.deepcopy(model))
            call = {"eps": 0.02, "steps": 13, "keep": "last", "bounds": (-9.0, 9.0)}
            generator = torch.Generator().manual_seed(seed)
            with attacks.count_forward_backward(model) as counts:
                attack(network, inputs, labels, generator=generator, norm=list(EPS)[seed], **call)
            counted.append((counts.forward, counts.backward))
        assert counted[0] == counted[1]
        assert counted[0][1] == 13 * 41


def test_only_graphs_are_taken_for_graphs(problem):
    model, _, _ = problem
    with pytest.raises(TypeError, match="graphs must be IterationGraphs or None, got 3"):
        attacks.Network(model, graphs=3)
    assert attacks.prepare(model, torch.rand(4, 3, 4, 5)).graphs is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_results_of_the_loop(problem, dtype):
    model, inputs, labels = problem
    model = copy.deepcopy(model).to("cuda")
    inputs, labels = inputs.to("cuda", dtype), labels.to("cuda")
    network, other = replaying(model, CudaCapture()), plain(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="iterations are not replayed")
        for seed in range(20):
            size = random.Random(seed).choice([1, 3, 17, 41])
            same_results(seed, network, other, inputs[:size], labels[:size], "cuda")
    assert network.graphs.captures > 3
    assert network.graphs.replays > 100
    reserved, held = torch.cuda.memory_reserved(), network.graphs.bytes
    assert 0 < held <= reserved
    network.graphs.clear()
    assert network.graphs.bytes == 0
