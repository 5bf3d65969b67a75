"""Strength against installed peers, on a network trained on CIFAR-10."""

import os

import pytest
import torch
from torch import nn

from fastlip import attacks, metrics
from fastlip.data import cifar10

foolbox = pytest.importorskip("foolbox")
torchattacks = pytest.importorskip("torchattacks")

pytestmark = pytest.mark.skipif("FASTLIP_DATA" not in os.environ, reason="FASTLIP_DATA names no folder of CIFAR-10")
EPS = {"linf": 1.5 / 255, "l2": 0.25, "l1": 5.0}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def problem():
    """A small network after two passes over 6,000 images, and 200 test images that it classifies correctly."""
    data = os.environ["FASTLIP_DATA"]
    train = cifar10(data, train=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(2048, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for step in range(2 * 6000 // 60):
            rows = torch.arange(60 * step, 60 * (step + 1)) % 6000
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.images[rows] / 255), train.labels[rows]).backward()
            optimizer.step()
    model.eval()
    test = cifar10(data, train=False)
    images, labels = test.images[:600] / 255, test.labels[:600]
    right = (model(images).argmax(1) == labels).nonzero().squeeze(1)[:200]
    assert len(right) == 200
    return model, images[right], labels[right]


def standing(model, found, labels):
    return (model(found).argmax(1) == labels).numpy()


def test_ten_steps_are_those_of_torchattacks_and_foolbox(problem):
    model, images, labels = problem
    eps, step = EPS["linf"], EPS["linf"] / 4
    call = {"steps": 10, "loss": "ce", "keep": "last", "random_start": False}
    ours = attacks.pgd(model, images, labels, eps=eps, step_size=step, **call)
    peer = torchattacks.PGD(model, eps=eps, alpha=step, steps=10, random_start=False)
    assert torch.equal(ours[:128], peer(images[:128], labels[:128]))
    # The peer's loss is a mean, and a division by 200 rounds, by which signs of gradients of rounding change.
    assert (ours != peer(images, labels)).double().mean() < 1e-5
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    for norm, attack in (("linf", foolbox.attacks.LinfPGD), ("l2", foolbox.attacks.L2PGD)):
        ours = attacks.pgd(model, images, labels, norm=norm, eps=EPS[norm], step_size=EPS[norm] / 4, **call)
        _, peer, _ = attack(steps=10, abs_stepsize=EPS[norm] / 4, random_start=False)(
            network, images, labels, epsilons=EPS[norm]
        )
        mine, theirs = standing(model, ours, labels), standing(model, peer, labels)
        # Exact projections in L2 use budget that foolbox's leaves: the same images, or one more.
        assert 0 <= theirs.sum() - mine.sum() <= (0 if norm == "linf" else 2)
        assert 0 < mine.sum() < 200, "the comparison needs images on both sides"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_no_weaker_than_any_peer(problem, norm):
    model, images, labels = problem
    eps, step = EPS[norm], EPS[norm] / 4
    ours = attacks.pgd(model, images, labels, norm=norm, eps=eps, step_size=step, steps=10, loss="ce", generator=gen())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peer = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
        found = [peer(model, eps=eps, alpha=step, steps=10, random_start=True)(images, labels)]
        attack = (foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD)(steps=10, abs_stepsize=step)
        network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found.append(attack(network, images, labels, epsilons=eps)[1])
    mine = standing(model, ours, labels)
    for peer in found:
        assert metrics.paired_bootstrap(mine, standing(model, peer, labels)).low <= 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_apgd_is_no_weaker_than_auto_attack(problem, norm):
    peer = pytest.importorskip("pyautoattack.autopgd_base")
    model, images, labels = problem
    images, labels = images[:100], labels[:100]
    theirs = peer.APGDAttack(
        model, n_iter=50, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=EPS[norm], loss="ce", seed=0,
        device="cpu", use_largereps=norm == "l1",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        want = standing(model, theirs.perturb(images, labels), labels)
    ours = attacks.apgd(model, images, labels, norm=norm, eps=EPS[norm], steps=50, loss="ce", generator=gen())
    mine = standing(model, ours, labels)
    assert metrics.paired_bootstrap(mine, want).low <= 0
    assert 0 < mine.sum() < 100, "the comparison needs images on both sides"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_minimal_norms_are_no_larger_than_foolbox(problem, norm):
    model, images, labels = problem
    images, labels = images[:100], labels[:100]
    peers = {
        "linf": [foolbox.attacks.LInfFMNAttack],
        "l2": [foolbox.attacks.L2FMNAttack, foolbox.attacks.DDNAttack],
        "l1": [foolbox.attacks.L1FMNAttack],
    }[norm]
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    ours = attacks.min_norm(model, images, labels, norm=norm, method="fmn", fmn_steps=50, loss="margin")
    assert ours.found.all()
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    for peer in peers:
        found = peer(steps=50).run(network, images, foolbox.criteria.Misclassification(labels))
        fell = ~torch.from_numpy(standing(model, found, labels))
        length = torch.linalg.vector_norm((found - images).double().flatten(1), order, dim=1)
        assert fell.float().mean() > 0.9
        assert ours.distance[fell].mean() <= length[fell].mean()
        assert metrics.paired_bootstrap(ours.distance[fell].numpy(), length[fell].numpy()).low <= 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_scale_of_logits_does_not_matter(problem, norm):
    model, images, labels = problem
    robust = [
        standing(model, attacks.pgd(lambda x, s=s: s * model(x), images, labels, norm=norm, eps=EPS[norm],
                                    steps=10, generator=gen()), labels)
        for s in (1, 64)
    ]  # fmt: skip
    difference = metrics.paired_bootstrap(*robust)
    assert difference.low <= 0 <= difference.high


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_monotone_in_eps_steps_and_restarts(problem, norm):
    model, images, labels = problem
    call = {"norm": norm, "loss": "ce", "generator": None}

    def robust(**options):
        found = attacks.pgd(model, images, labels, **call | options | {"generator": gen()})
        return standing(model, found, labels)

    radii = [robust(eps=s * EPS[norm], steps=10).mean() for s in (0.25, 0.5, 1, 2)]
    assert radii == sorted(radii, reverse=True)
    few = robust(eps=EPS[norm], steps=5, step_size=EPS[norm] / 4)
    many = robust(eps=EPS[norm], steps=15, step_size=EPS[norm] / 4)
    assert (few | ~many).all(), "nested steps"
    more = robust(eps=EPS[norm], steps=5, step_size=EPS[norm] / 4, restarts=3)
    assert (few | ~more).all(), "nested restarts"
