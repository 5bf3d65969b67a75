import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("art")
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

from fastlip.integrations import art as ours

EPS = {np.inf: 0.08, 2: 1.2, 1: 8.0}


def classifier(model, **options):
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 12, 12), 10, clip_values=(0.0, 1.0), device_type="cpu", **options
    )


@pytest.mark.parametrize("norm", [np.inf, 2, 1])
@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_same_call_and_no_weaker(trained, norm, path, monkeypatch):
    model, inputs, labels = trained
    x, y = inputs.numpy(), labels.numpy()
    call = {"norm": norm, "eps": EPS[norm], "eps_step": EPS[norm] / 4, "max_iter": 10, "batch_size": 13}
    if path == "numpy":
        monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    estimator = classifier(model)
    want = ProjectedGradientDescent(estimator, verbose=False, **call).generate(x, y)
    found = ours.FastlipPGD(estimator, **call).generate(x, y)
    assert found.dtype == x.dtype
    moved = (found.astype(np.float64) - x).reshape(len(x), -1)
    assert (np.linalg.norm(moved, norm, axis=1) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    standing = [(estimator.predict(z).argmax(1) == y).sum() for z in (found, want)]
    assert standing[0] <= standing[1] + 1
    assert standing[0] < len(x)
    if norm == np.inf and path == "numpy":
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_both_paths_take_the_same_steps(trained, monkeypatch):
    model, inputs, labels = trained
    attack = ours.FastlipPGD(
        classifier(model), eps=0.05, eps_step=0.0125, max_iter=5, keep="last", num_random_init=0, batch_size=64
    )
    torch_path = attack.generate(inputs.numpy(), labels.numpy())
    monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    np.testing.assert_array_equal(attack.generate(inputs.numpy(), labels.numpy()), torch_path)


def test_preprocessing_takes_the_numpy_path(trained):
    model, inputs, labels = trained
    estimator = classifier(model, preprocessing=(np.float32(0.1), np.float32(1.1)))
    assert not ours._plain_torch(estimator)
    assert ours._plain_torch(classifier(model))
    x, y = inputs.numpy(), labels.numpy()
    found = ours.FastlipPGD(estimator, eps=0.1, eps_step=0.02, max_iter=10, num_random_init=2).generate(x, y)
    assert (estimator.predict(found).argmax(1) == y).mean() < (estimator.predict(x).argmax(1) == y).mean()


def test_other_frameworks():
    """A classifier of scikit-learn, where torch never sees the model."""
    linear = pytest.importorskip("sklearn.linear_model")
    from art.estimators.classification import SklearnClassifier

    rng = np.random.default_rng(0)
    x = rng.random((60, 7)).astype(np.float32)
    y = (x[:, 0] > 0.5).astype(np.int64)
    estimator = SklearnClassifier(linear.LogisticRegression(C=100.0).fit(x, y), clip_values=(0.0, 1.0))
    found = ours.FastlipPGD(estimator, norm=2, eps=0.3, eps_step=0.1, max_iter=10).generate(x)
    assert (estimator.predict(found).argmax(1) == y).mean() < 0.6 < (estimator.predict(x).argmax(1) == y).mean()


@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_targeted_per_sample_eps_and_seed(trained, path, monkeypatch):
    model, inputs, labels = trained
    if path == "numpy":
        monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    x, targets = inputs.numpy(), ((labels + 3) % 10).numpy()
    eps = np.linspace(0, 0.3, len(x), dtype=np.float32)
    call = {"eps": eps, "eps_step": eps / 8, "max_iter": 20, "targeted": True, "num_random_init": 2, "seed": 3}
    attack = ours.FastlipPGD(classifier(model), **call)
    found = attack.generate(x, np.eye(10)[targets])
    assert (np.abs(found - x).reshape(len(x), -1).max(1) <= eps + 1e-6).all()
    assert (classifier(model).predict(found)[-8:].argmax(1) == targets[-8:]).mean() > 0.7
    np.testing.assert_array_equal(found, attack.generate(x, targets))


@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_arrays_of_other_types(trained, path, monkeypatch):
    model, inputs, labels = trained
    if path == "numpy":
        monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    pixels, y = (255 * inputs).byte().numpy(), labels.numpy()
    scaled = PyTorchClassifier(
        nn.Sequential(Scale(), model), nn.CrossEntropyLoss(), (3, 12, 12), 10, clip_values=(0, 255), device_type="cpu"
    )
    found = ours.FastlipPGD(scaled, eps=20, eps_step=5, max_iter=5).generate(pixels, y)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - pixels).max() <= 20 + 1e-4
    if path == "torch":
        wide = ours.FastlipPGD(scaled, eps=20, eps_step=5, max_iter=5).generate(pixels.astype(np.float64), y)
        np.testing.assert_array_equal(wide, found)


@pytest.mark.parametrize("options", [{}, {"num_random_init": 2}, {"targeted": True}])
@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_what_has_fallen_already_comes_back_as_it_is(trained, path, options, monkeypatch):
    model, inputs, labels = trained
    if path == "numpy":
        monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    x = inputs.numpy()
    fallen = np.arange(len(x)) % 2 == 0
    y = np.where(fallen == bool(options.get("targeted")), labels.numpy(), (labels.numpy() + 1) % 10)
    call = {"eps": 0.05, "eps_step": 0.01, "max_iter": 3} | options
    moved = (ours.FastlipPGD(classifier(model), **call).generate(x, y) != x).reshape(len(x), -1).any(1)
    np.testing.assert_array_equal(moved, ~fallen)
    last = ours.FastlipPGD(classifier(model), keep="last", **call).generate(x, y)
    assert (last != x).reshape(len(x), -1).any(1).all()


def test_errors_say_art_s_names(trained):
    model, inputs, labels = trained
    for options, message in (
        ({"eps_step": np.inf}, "eps_step must be"),
        ({"max_iter": -1}, "max_iter must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"step_size": np.inf}, "step_size must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            ours.FastlipPGD(classifier(model), **options).generate(inputs.numpy(), labels.numpy())


class Scale(nn.Module):
    def forward(self, x):
        return x / 255


def test_errors(trained):
    model, inputs, _ = trained
    with pytest.raises(ValueError, match="norm must be"):
        ours.FastlipPGD(classifier(model), norm=3)
    with pytest.raises(ValueError, match="classes to reach"):
        ours.FastlipPGD(classifier(model), targeted=True).generate(inputs.numpy())
    with pytest.raises(ValueError, match="x, y and mask alone, got cost"):
        ours.FastlipPGD(classifier(model)).generate(inputs.numpy(), cost=1)
    with pytest.raises(ValueError, match="x must lie within clip_values"):
        ours.FastlipPGD(classifier(model)).generate(inputs.numpy() - 1)


class Normalising(PyTorchClassifier):
    def _apply_preprocessing(self, x, y=None, fit=False, no_grad=True):
        x, y = super()._apply_preprocessing(x, y, fit, no_grad)
        return (x - 0.45) / 0.05, y


class RaiseClass3(nn.Module):
    reduction = "mean"

    def forward(self, logits, labels):
        return logits[:, 3].mean()


@pytest.mark.parametrize(("made", "loss"), [(Normalising, nn.CrossEntropyLoss()), (PyTorchClassifier, RaiseClass3())])
def test_what_an_estimator_does_of_its_own_is_part_of_the_attack(trained, made, loss):
    """A subclass processes its samples, and a loss is what its author wants to climb: as ART's own PGD has it."""
    model, inputs, _ = trained
    estimator = made(model, loss, (3, 12, 12), 10, clip_values=(0.0, 1.0), device_type="cpu")
    x = inputs.numpy()
    y = estimator.predict(x).argmax(1)
    call = {"eps": 0.01, "eps_step": 0.0025, "max_iter": 10, "batch_size": 32}
    want = ProjectedGradientDescent(estimator, verbose=False, **call).generate(x, y)
    found = ours.FastlipPGD(estimator, keep="last", **call).generate(x, y)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("weighted", [{"weight": torch.ones(10)}, {"label_smoothing": 0.1}, {"ignore_index": 3}])
def test_another_cross_entropy_is_another_loss(trained, weighted):
    estimator = PyTorchClassifier(trained[0], nn.CrossEntropyLoss(**weighted), (3, 12, 12), 10, clip_values=(0, 1))
    assert not ours.FastlipPGD(estimator)._is_pgd_s()
    assert ours.FastlipPGD(estimator, loss="dlr")._is_pgd_s()
    assert ours.FastlipPGD(classifier(trained[0]))._is_pgd_s()


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", -1), ("eps", "x"), ("eps_step", -1), ("targeted", "true"), ("num_random_init", 1.0), ("batch_size", -1),
     ("batch_size", 0), ("max_iter", -1), ("max_iter", 1.5), ("verbose", "true"), ("norm", 5), ("seed", -1)],
)  # fmt: skip
def test_parameters_are_checked_when_made_set_and_used(trained, name, value):
    estimator = classifier(trained[0])
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        ours.FastlipPGD(estimator, **{name: value})
    attack = ours.FastlipPGD(estimator)
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        attack.set_params(**{name: value})
    attack = ours.FastlipPGD(estimator)
    setattr(attack, name, value)
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        attack.generate(trained[1].numpy())


@pytest.mark.parametrize("options", [{"random_eps": True}, {"decay": 0.5}, {"keep": "lats"}, {"loss": "dlr"}])
def test_options_that_cannot_be_had_are_refused(trained, options):
    if "loss" not in options:
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            ours.FastlipPGD(classifier(trained[0]), **options).generate(trained[1].numpy())
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ours.FastlipPGD(classifier(trained[0], preprocessing=(np.float32(0.1), np.float32(1.1))), **options)


@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_a_mask_and_samples_outside_by_rounding(trained, path, monkeypatch):
    model, inputs, labels = trained
    if path == "numpy":
        monkeypatch.setattr(ours, "_plain_torch", lambda estimator: False)
    x = inputs.numpy().copy()
    x[:, :, 0] = -2.98e-8
    mask = np.zeros((12, 12))
    mask[:6] = 1
    call = {"eps": 0.1, "eps_step": 0.05, "max_iter": 3, "keep": "last", "batch_size": 13}
    found = ours.FastlipPGD(classifier(model), **call).generate(x, labels.numpy(), mask=mask)
    moved = np.abs(found - x).max((0, 1))
    assert (moved[6:] == 0).all()
    assert (moved[:6] > 0.05).all()
    assert found.min() >= 0
