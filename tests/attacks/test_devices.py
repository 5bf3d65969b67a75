"""Whole attacks and norms on each device there is, with the faster copies that a GPU replays from CUDA graphs."""

import pytest
import torch
from torch import Tensor, nn

import fastlip
from fastlip import attacks

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
ATTACKS = {"pgd": attacks.pgd, "apgd": attacks.apgd}
COPIES = [{}, {"fast": True}, {"fast": True, "precision": torch.bfloat16}, {"fast": True, "precision": torch.float16}]


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 5),
    )
    for _ in range(5):
        net(torch.rand(64, 3, 16, 16))
    return net.eval()


def task(network: nn.Module) -> tuple[Tensor, Tensor]:
    images = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, network(images).argmax(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("options", COPIES, ids=str)
def test_attacks(network, name, norm, options, device):
    images, labels = task(network)
    eps = {"linf": 0.02, "l2": 0.5, "l1": 3.0}[norm]
    settings = {"norm": norm, "eps": eps, "steps": 12, "random_start": False}
    plain = ATTACKS[name](network, images, labels, **settings)
    with torch.no_grad():
        fell = network(plain).argmax(1) != labels
    assert 5 < fell.sum() < 50
    there = network.to(device)
    try:
        x = images.to(device)
        found = ATTACKS[name](there, x, labels.to(device), **settings, **options)
        with torch.no_grad():
            hit = there(found).argmax(1).cpu() != labels
    finally:
        network.to("cpu")
    size = (found - x).flatten(1).norm(p={"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (size <= eps * (1 + 1e-5)).all()
    # Rounding decides a few images either way.
    assert (hit != fell).sum() <= 3


@pytest.mark.parametrize("device", DEVICES)
def test_norms_and_bounds(network, device):
    want, bound = fastlip.layer_norms(network, (3, 16, 16)), fastlip.lipschitz_bound(network, (3, 16, 16))
    there = network.to(device)
    try:
        reports = fastlip.layer_norms([there, there], (3, 16, 16))
        iterated = fastlip.layer_norms(there, (3, 16, 16), method="lanczos")
        other = fastlip.lipschitz_bound(there, (3, 16, 16))
        local = fastlip.local_lipschitz(there, torch.rand(4, 3, 16, 16, device=device))
    finally:
        network.to("cpu")
    for report in (*reports, iterated):
        for name, interval in report.items():
            assert interval.lower <= want[name].upper * (1 + 1e-12)
            assert want[name].lower <= interval.upper * (1 + 1e-12)
    assert other.log10_upper == pytest.approx(bound.log10_upper, abs=0.02)
    assert (local > 0).all()
