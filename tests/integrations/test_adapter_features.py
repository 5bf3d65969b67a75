"""Masks and radii of features, and criteria, through the adapters, against their definitions."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.integrations.autoattack import AutoAttack

EPS = 0.17


def features(inputs):
    mask = torch.zeros(inputs.shape[1:])
    mask[..., 2:10, 2:10] = 1.0
    return mask, EPS * torch.rand(inputs.shape[1:], generator=torch.Generator().manual_seed(1))


def check(found, inputs, mask, radius, exact=True):
    moved = (torch.as_tensor(found).double() - inputs.double()).abs()
    assert (moved <= torch.where(mask != 0, radius, 0.0) + (0 if exact else 1e-7)).all()
    assert moved.sum() > 1


def through_torchattacks(model, inputs, labels, **options):
    ours = pytest.importorskip("fastlip.integrations.torchattacks", exc_type=ImportError)
    attack = ours.PGD(model, eps=EPS, alpha=EPS / 4, steps=5, keep="last", **options)
    return attack(inputs, labels)


def through_foolbox(model, inputs, labels, **options):
    pytest.importorskip("foolbox")
    import foolbox

    from fastlip.integrations import foolbox as ours

    attack = ours.LinfPGD(steps=5, keep="last", **options)
    raw, _, _ = attack(foolbox.PyTorchModel(model, (0, 1)), inputs, labels, epsilons=EPS)
    return raw


def through_min_norm(model, inputs, labels, **options):
    pytest.importorskip("foolbox")
    import foolbox

    from fastlip.integrations import foolbox as ours

    attack = ours.MinNorm("linf", method="search", steps=3, search_steps=3, **options)
    raw, _, _ = attack(foolbox.PyTorchModel(model, (0, 1)), inputs, labels, epsilons=None)
    return raw


def art_classifier(model):
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 12, 12), 10, clip_values=(0.0, 1.0), device_type="cpu")


def through_art(model, inputs, labels, *, mask, radius):
    classifier = art_classifier(model)
    from fastlip.integrations.art import FastlipPGD

    attack = FastlipPGD(classifier, eps=radius.numpy(), eps_step=radius.numpy() / 4, max_iter=8, batch_size=9)
    return attack.generate(inputs.numpy(), labels.numpy(), mask=mask.numpy())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("through", [through_torchattacks, through_foolbox, through_min_norm, through_art])
def test_perturbations_stay_in_mask_and_radii(trained, through):
    model, inputs, labels = trained
    mask, radius = features(inputs)
    check(through(model, inputs, labels, mask=mask, radius=radius), inputs, mask, radius)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("through", [through_torchattacks, through_foolbox])
def test_they_are_settings_like_others(trained, through):
    model, inputs, labels = trained
    mask, _ = features(inputs)
    everywhere = torch.full_like(mask, EPS)
    check(through(model, inputs, labels, mask=mask), inputs, mask, everywhere + 1e-6)
    check(through(model, inputs, labels, radius=everywhere / 2), inputs, torch.ones_like(mask), everywhere / 2)
    with pytest.raises(ValueError, match="mask must broadcast"):
        through(model, inputs, labels, mask=torch.ones(5))


def test_a_mask_assigned_later_takes_effect(trained):
    pytest.importorskip("torchattacks")
    from fastlip.integrations import torchattacks as ours

    model, inputs, labels = trained
    mask, _ = features(inputs)
    attack = ours.PGD(model, eps=EPS, steps=5, keep="last")
    assert not torch.equal(attack(inputs, labels)[..., 0, 0], inputs[..., 0, 0])
    attack.mask = mask
    assert torch.equal(attack(inputs, labels)[..., 0, 0], inputs[..., 0, 0])
    attack.radius = 0.01
    assert ((attack(inputs, labels) - inputs).abs() <= 0.01 + 1e-7).all()


@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_art_s_radii_of_features(trained, path, monkeypatch):
    model, inputs, labels = trained
    classifier = art_classifier(model)
    from fastlip.integrations import art as ours

    if path == "numpy":
        monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    x, y = inputs.numpy(), labels.numpy()
    mask, radius = features(inputs)
    every = torch.ones_like(mask)
    for eps, allowed in (
        (radius.numpy(), radius),
        (np.linspace(0.05, 0.2, 3).reshape(3, 1, 1), torch.linspace(0.05, 0.2, 3, dtype=torch.float64)[:, None, None]),
        (np.linspace(0.05, 0.2, 32).reshape(32, 1, 1, 1), torch.linspace(0.05, 0.2, 32).double().reshape(32, 1, 1, 1)),
    ):
        attack = ours.FastlipPGD(classifier, eps=eps, eps_step=eps / 3, max_iter=6, batch_size=9, keep="last")
        found = attack.generate(x, y)
        check(found, inputs, every, allowed.expand(inputs.shape), exact=False)
        assert np.isclose(np.abs(found - x).max(), eps.max(), atol=1e-3)
        random = ours.FastlipPGD(classifier, eps=eps, eps_step=eps / 3, max_iter=2, num_random_init=1, batch_size=9)
        assert (np.abs(random.generate(x, y) - x) <= np.broadcast_to(eps, x.shape) + 1e-7).all()
    with pytest.raises(ValueError, match="eps must be one number or one for each sample where norm"):
        ours.FastlipPGD(classifier, norm=2, eps=radius.numpy(), eps_step=0.1).generate(x, y)
    with pytest.raises(ValueError, match="eps must broadcast to x's shape"):
        ours.FastlipPGD(classifier, eps=np.ones((7, 1, 1)), eps_step=0.1).generate(x, y)
    with pytest.raises(ValueError, match="mask must broadcast to x's shape"):
        ours.FastlipPGD(classifier, eps=0.1).generate(x, y, mask=np.ones(5))


def test_auto_attack_takes_bounds_of_images(trained):
    model, inputs, labels = trained
    mask, radius = features(inputs)
    for bounds in (
        attacks.feature_box(inputs, mask=mask, radius=radius),
        partial(attacks.feature_box, mask=mask, radius=radius),
    ):
        adversary = AutoAttack(
            model, eps=EPS, bounds=bounds, version="custom", attacks_to_run=["apgd-ce"], verbose=False, seed=0
        )
        adversary.apgd.n_iter = 5
        check(adversary.run_standard_evaluation(inputs, labels, bs=9), inputs, mask, radius)
        assert adversary.evaluation.robust_accuracy < 1


def sure(logits, labels):
    return (logits.softmax(1).amax(1) > 0.9) & (logits.argmax(1) != labels)


def test_criteria_through_adapters(trained):
    """More images fool the model as the criterion has it than where any wrong decision ends the attack."""
    model, inputs, labels = trained
    pytest.importorskip("torchattacks")
    from fastlip.integrations import torchattacks as ours

    options = {"eps": 0.15, "alpha": 0.04, "steps": 8}
    found = ours.PGD(model, **options, criterion=sure)(inputs, labels)
    assert sure(model(found), labels).sum() > sure(model(ours.PGD(model, **options)(inputs, labels)), labels).sum()
    square = ours.Square(model, eps=0.3, n_queries=60, criterion=sure)(inputs, labels)
    moved = (square != inputs).flatten(1).any(1)
    assert torch.equal(moved, sure(model(square), labels))
    assert moved.any()
    classifier = art_classifier(model)
    from fastlip.integrations.art import FastlipPGD

    call = {"eps": 0.15, "eps_step": 0.04, "max_iter": 8}
    found, plain = (
        torch.from_numpy(FastlipPGD(classifier, **call, **own).generate(inputs.numpy(), labels.numpy()))
        for own in ({"criterion": sure}, {})
    )
    assert sure(model(found), labels).sum() > sure(model(plain), labels).sum()
