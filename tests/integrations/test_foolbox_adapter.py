import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import attacks

foolbox = pytest.importorskip("foolbox")
from fastlip.integrations import foolbox as ours  # noqa: E402


def wrapped(model):
    return foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")


@pytest.mark.parametrize(("name", "eps"), [("LinfPGD", 0.08), ("L2PGD", 1.2), ("L1PGD", 8.0)])
def test_same_call_and_no_weaker(trained, name, eps):
    model, inputs, labels = trained
    network = wrapped(model)
    options = {"steps": 10, "rel_stepsize": 0.25, "random_start": False}
    _, _, want = getattr(foolbox.attacks, name)(**options)(network, inputs, labels, epsilons=eps)
    attack = getattr(ours, name)(**options)
    assert isinstance(attack, foolbox.attacks.base.Attack)
    raw, clipped, success = attack(network, inputs, labels, epsilons=eps)
    assert torch.equal(success, model(clipped).argmax(1) != labels)
    assert success.sum() >= want.sum() - 1
    assert (attack.distance(inputs, raw) <= eps * (1 + 1e-5)).all()
    several, _, successes = attack(network, inputs, labels, epsilons=[0.0, eps])
    assert len(several) == 2
    assert not successes[0].any()


@pytest.mark.parametrize("name", ["APGD", "Square"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_that_foolbox_has_not(trained, name, norm):
    model, inputs, labels = trained
    budget = {"steps": 10} if name == "APGD" else {"queries": 400}
    _, _, success = getattr(ours, name)(norm, **budget)(
        wrapped(model), inputs, labels, epsilons=0.2 if norm == "linf" else 4.0
    )
    assert success.float().mean() > 0.5


def test_minimal_norms(trained):
    model, inputs, labels = trained
    network = wrapped(model)
    peer = foolbox.attacks.L2FMNAttack(steps=50)
    _, want, found_peer = peer(network, inputs, labels, epsilons=None)
    attack = ours.MinNorm("l2", method="fmn", fmn_steps=50)
    _, found, success = attack(network, inputs, labels, epsilons=None)
    assert success.all()
    assert attack.distance(inputs, found).mean() <= attack.distance(inputs, want)[found_peer].mean() * 1.01


def test_targeted(trained):
    model, inputs, labels = trained
    targets = (labels + 3) % 10
    criterion = foolbox.criteria.TargetedMisclassification(targets)
    _, found, success = ours.LinfPGD(steps=30)(wrapped(model), inputs, criterion, epsilons=0.3)
    assert success.float().mean() > 0.8
    assert torch.equal(success, model(found).argmax(1) == targets)


class Convolutions(TorchDispatchMode):
    """Counts PyTorch's convolutions, which a copy does without on a CPU."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += "convolution" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "preprocessing",
    [
        None,
        {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "axis": -3, "flip_axis": -3},
        {"std": torch.tensor(0.5)},
    ],
)
def test_fast_follows_a_copy_of_the_network_inside(trained, preprocessing):
    model, inputs, labels = trained
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu", preprocessing=preprocessing)
    labels = network(inputs).argmax(1)
    inside = ours._network(network)
    assert torch.equal(inside(inputs), network(inputs))
    assert ours._network(network) is inside
    assert not attacks.prepare(inside, inputs).exact
    counts = []
    for fast in (False, True):
        with Convolutions() as counted:
            ours.LinfPGD(steps=5, random_start=False, fast=fast).run(network, inputs, labels, epsilon=1e-4)
        counts.append(counted.made)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert counts[0] >= 11 * convolutions, "six passes forward and five back"
    assert counts[1] < 6 * convolutions


def test_other_models_are_attacked_as_they_come(trained):
    model, inputs, labels = trained
    network = wrapped(model).transform_bounds((-1, 1), wrapper=True)
    assert ours._network(network) is network
    _, found, success = ours.LinfPGD(steps=10, rel_stepsize=0.25, fast=True)(
        network, 2 * inputs - 1, labels, epsilons=0.3
    )
    assert success.any()
    assert torch.equal(success, network(found).argmax(1) != labels)


def test_an_attack_that_writes_into_its_arguments_changes_no_verdict(trained):
    model, inputs, labels = trained
    before = inputs.clone(), labels.clone()

    def attack(model, images, labels, *, norm, eps, bounds):
        labels.add_(1)
        return images.fill_(0.5)

    _, clipped, success = ours.FixedEpsilon(attack, "linf")(wrapped(model), inputs, labels, epsilons=0.01)
    assert torch.equal(inputs, before[0])
    assert torch.equal(labels, before[1])
    assert (clipped - inputs).abs().max() <= 0.01 + 1e-6
    assert torch.equal(success, model(clipped).argmax(1) != labels)


def test_repeats(trained):
    model, inputs, labels = trained
    _, _, success = ours.LinfPGD(steps=10, rel_stepsize=0.25).repeat(2)(wrapped(model), inputs, labels, epsilons=0.08)
    assert success.any()


def test_errors(trained):
    model, inputs, labels = trained
    network = wrapped(model)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ours.LinfPGD().run(network, inputs, labels, epsilon=0.1, other=1)
    with pytest.raises(TypeError, match="PyTorch"):
        ours.LinfPGD().run(network, inputs.numpy(), labels, epsilon=0.1)
    with pytest.raises(ValueError, match="criterion must be"):
        ours.LinfPGD().run(network, inputs, "labels", epsilon=0.1)
    for attack, epsilon, message in (
        (ours.LinfPGD(), -0.1, "epsilons must be"),
        (ours.LinfPGD(abs_stepsize=float("nan")), 0.1, "abs_stepsize must be"),
        (ours.L2PGD(rel_stepsize=float("inf")), 0.1, "rel_stepsize must be"),
        (ours.LinfPGD(step_size=float("inf")), 0.1, "step_size must be"),
        (ours.LinfPGD(steps=-1), 0.1, "steps must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            attack.run(network, inputs, labels, epsilon=epsilon)


def test_settings_changed_after_construction_take_effect(trained):
    model, inputs, labels = trained
    network = wrapped(model)
    found = []
    for library in (foolbox.attacks, ours):
        attack = library.LinfPGD(steps=0, random_start=False)
        attack.steps, attack.rel_stepsize = 10, 0.25
        found.append(attack(network, inputs, labels, epsilons=0.08)[2])
    assert torch.equal(*found)
    assert found[0].any()
    attack.abs_stepsize = float("nan")
    with pytest.raises(ValueError, match=r"^abs_stepsize must be"):
        attack.run(network, inputs, labels, epsilon=0.08)
    minimal = ours.MinNorm("l2", steps=1)
    minimal.method, minimal.fmn_steps = "fmn", 5
    assert minimal.options == {"steps": 1, "method": "fmn", "fmn_steps": 5}
    for changed in (attack, minimal, ours.Square("linf")):
        with pytest.raises(AttributeError, match="no setting 'stepsize'"):
            changed.stepsize = 0.1


def test_a_model_whose_bounds_change_in_place(trained):
    model, inputs, _ = trained
    preprocessing = {"mean": [125.0, 120.0, 115.0], "std": [60.0, 60.0, 60.0], "axis": -3}
    network = foolbox.PyTorchModel(model, bounds=(0, 255), preprocessing=preprocessing, device="cpu")
    before = ours._network(network)
    network.transform_bounds((0, 1), inplace=True)
    assert torch.equal(ours._network(network)(inputs), network(inputs))
    assert ours._network(network) is not before
    assert ours._network(network) is ours._network(network)
