import pytest
import torch

from fastlip import attacks, metrics

foolbox = pytest.importorskip("foolbox")
torchattacks = pytest.importorskip("torchattacks")


@pytest.mark.parametrize(("eps", "steps", "step_size"), [(8 / 255, 10, 2 / 255), (0.06, 7, 0.017)])
def test_linf_is_bit_identical_to_torchattacks(cnn_problem, eps, steps, step_size):
    model, inputs, labels = cnn_problem
    peer = torchattacks.PGD(model, eps=eps, alpha=step_size, steps=steps, random_start=False)
    ours = attacks.pgd(
        model,
        inputs,
        labels,
        eps=eps,
        steps=steps,
        step_size=step_size,
        loss="ce",
        random_start=False,
        keep="last",
    )
    assert torch.equal(ours, peer(inputs, labels))


@pytest.mark.parametrize(("norm", "peer"), [("linf", "LinfPGD"), ("l2", "L2PGD")])
def test_same_robust_accuracy_as_foolbox(cnn_problem, norm, peer):
    model, inputs, labels = cnn_problem
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    fell = []
    for eps in (0.05, 0.065, 0.08) if norm == "linf" else (0.8, 1.0, 1.2):
        attack = getattr(foolbox.attacks, peer)(steps=10, abs_stepsize=eps / 4, random_start=False)
        _, _, success = attack(network, inputs, labels, epsilons=eps)
        ours = attacks.pgd(
            model,
            inputs,
            labels,
            norm=norm,
            eps=eps,
            steps=10,
            step_size=eps / 4,
            loss="ce",
            random_start=False,
            keep="last",
        )
        assert torch.equal(model(ours).argmax(1) != labels, success)
        fell.append(success.float().mean().item())
    assert 0 < min(fell) < 1, "the comparison needs images on both sides"


def test_default_attack_is_no_weaker_than_torchattacks_at_equal_budget(cnn_problem):
    model, inputs, labels = cnn_problem
    ours = attacks.pgd(model, inputs, labels, eps=0.065, steps=10, generator=torch.Generator().manual_seed(0))
    peer = torchattacks.PGD(model, eps=0.065, alpha=0.01625, steps=10, random_start=False)(inputs, labels)
    standing = [metrics.accuracy(model, x, labels).numpy() for x in (ours, peer)]
    assert metrics.paired_bootstrap(*standing).low <= 0
