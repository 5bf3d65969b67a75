"""What users of ART rely on, asked of ART's ProjectedGradientDescent and of our class in its place."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("art")
from art.attacks import EvasionAttack
from art.attacks.evasion import AutoAttack, ProjectedGradientDescent
from art.defences.preprocessor import SpatialSmoothing
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from art.utils import compute_success, to_categorical

from fastlip.integrations.art import FastlipPGD

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EPS = 0.1


@pytest.fixture(params=["art", "fastlip"])
def made(request):
    """Makes the attack of one of the libraries."""
    if request.param == "fastlip":
        return FastlipPGD
    return lambda estimator, **options: ProjectedGradientDescent(estimator, verbose=False, **options)


def classifier(model, **options):
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 12, 12), 10, clip_values=(0.0, 1.0), device_type="cpu", **options
    )


@pytest.fixture
def problem(trained_cnn):
    model, images, labels = trained_cnn
    return classifier(copy.deepcopy(model)), images.numpy().copy(), labels.numpy().copy()


CALL = {"eps": EPS, "eps_step": EPS / 4, "max_iter": 6}


def test_arrays_in_arrays_out(made, problem):
    estimator, x, y = problem
    before = x.copy(), y.copy()
    attack = made(estimator, **CALL)
    assert isinstance(attack, EvasionAttack)
    assert attack.estimator is estimator
    found = attack.generate(x=x, y=y)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])
    assert found.shape == x.shape
    assert found.dtype == np.float32
    assert np.abs(found - x).max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert (estimator.predict(found).argmax(1) != y).mean() > 0.3
    assert compute_success(estimator, x, to_categorical(y, 10), found) > 0.3


def test_labels_in_any_form_or_none(made, problem):
    estimator, x, y = problem
    attack = made(estimator, **CALL)
    want = attack.generate(x, y)
    np.testing.assert_array_equal(attack.generate(x, to_categorical(y, 10)), want)
    np.testing.assert_array_equal(attack.generate(x), want)
    np.testing.assert_array_equal(attack.generate(x, y[:, None]), want)


def test_targets(made, problem):
    estimator, x, y = problem
    targets = (y + 1) % 10
    attack = made(estimator, eps=0.4, eps_step=0.05, max_iter=15, targeted=True)
    assert attack.targeted
    assert (estimator.predict(attack.generate(x, targets)).argmax(1) == targets).mean() > 0.5
    with pytest.raises(ValueError, match="arget"):
        attack.generate(x)


def test_the_size_of_batches_changes_nothing(made, problem):
    estimator, x, y = problem
    found = [made(estimator, **CALL, batch_size=size).generate(x, y) for size in (5, 32)]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("norm", [np.inf, "inf", 2, 1])
def test_norms(made, problem, norm):
    estimator, x, y = problem
    eps = {2: 1.5, 1: 10.0}.get(norm, EPS)
    found = made(estimator, norm=norm, eps=eps, eps_step=eps / 4, max_iter=6).generate(x, y)
    order = np.inf if norm == "inf" else norm
    length = np.linalg.norm((found - x).reshape(32, -1).astype(np.float64), order, axis=1)
    assert (length <= eps * (1 + 1e-4) + 1e-5).all()
    assert length.max() > eps / 10


def test_parameters_may_be_set(made, problem):
    estimator, x, y = problem
    attack = made(estimator, **CALL)
    attack.set_params(eps=0.01, eps_step=0.005)
    assert attack.eps == 0.01
    assert np.abs(attack.generate(x, y) - x).max() <= 0.01 + 1e-6
    assert {"norm", "eps", "eps_step", "max_iter", "targeted", "num_random_init", "batch_size"} <= set(
        attack.attack_params
    )
    with pytest.raises(ValueError, match="not"):
        attack.set_params(no_such_parameter=1)
    with pytest.raises((ValueError, TypeError)):
        attack.set_params(eps=-1.0)


def test_masks(made, problem):
    estimator, x, y = problem
    attack = made(estimator, **CALL)
    of_features = np.zeros(x.shape[1:], np.float32)
    of_features[:, 2:10, 2:10] = 1
    of_samples = np.ones(x.shape, np.float32)
    of_samples[::2, :, :6] = 0
    for mask in (of_features, of_samples):
        found = attack.generate(x, y, mask=mask)
        kept = np.broadcast_to(mask == 0, x.shape)
        np.testing.assert_array_equal(found[kept], x[kept])
        assert np.abs(found - x).max() > EPS / 2


def test_radii_of_features(made, problem):
    estimator, x, y = problem
    eps = (EPS * np.random.default_rng(0).uniform(0.1, 1, x.shape[1:])).astype(np.float32)
    found = made(estimator, eps=eps, eps_step=eps / 3, max_iter=6).generate(x, y)
    assert (np.abs(found - x) <= eps + 1e-6).all()
    assert np.abs(found - x).max() > EPS / 2


def test_random_starts_help(made, problem):
    estimator, x, y = problem
    call = CALL | {"max_iter": 2}
    np.random.seed(0)  # noqa: NPY002
    fell = [(estimator.predict(made(estimator, **call, num_random_init=n).generate(x, y)).argmax(1) != y).sum()
            for n in (1, 4)]  # fmt: skip
    assert fell[1] >= fell[0] - 1


def test_an_estimator_that_smooths_its_samples(made, trained_cnn):
    model, images, labels = trained_cnn
    estimator = classifier(copy.deepcopy(model), preprocessing_defences=SpatialSmoothing(window_size=2))
    x, y = images.numpy(), labels.numpy()
    found = made(estimator, **CALL | {"eps": 0.2, "eps_step": 0.05}).generate(x, y)
    before, after = ((estimator.predict(z).argmax(1) == y).mean() for z in (x, found))
    assert after < before


def test_adversarial_training(made, trained_cnn):
    model, images, labels = trained_cnn
    torch.manual_seed(0)
    network = copy.deepcopy(model)
    estimator = classifier(network, optimizer=torch.optim.Adam(network.parameters(), 2e-3))
    x, y = images.numpy(), labels.numpy()
    attack = made(estimator, eps=0.08, eps_step=0.03, max_iter=4)
    before = (estimator.predict(attack.generate(x, y)).argmax(1) == y).mean()
    AdversarialTrainer(estimator, attacks=attack, ratio=1.0).fit(x, y, batch_size=16, nb_epochs=10)
    after = (estimator.predict(attack.generate(x, y)).argmax(1) == y).mean()
    assert after > before


def test_part_of_art_s_auto_attack(made, problem):
    pytest.importorskip("multiprocess")  # which ART's class imports, and does not require
    estimator, x, y = problem
    attack = made(estimator, **CALL)
    found = AutoAttack(estimator, eps=EPS, eps_step=EPS / 4, attacks=[attack]).generate(x, y)
    assert np.abs(found - x).max() <= EPS + 1e-6
    assert (estimator.predict(found).argmax(1) != y).mean() > 0.3


def test_no_weaker_than_art(problem):
    estimator, x, y = problem
    for norm, eps in ((np.inf, 0.07), (2, 1.2)):
        call = {"norm": norm, "eps": eps, "eps_step": eps / 4, "max_iter": 8}
        standing = [
            int((estimator.predict(attack.generate(x, y)).argmax(1) == y).sum())
            for attack in (ProjectedGradientDescent(estimator, verbose=False, **call), FastlipPGD(estimator, **call))
        ]
        assert standing[1] <= standing[0] + 1, (norm, standing)
