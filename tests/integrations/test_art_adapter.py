import numpy as np
import pytest
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
    with pytest.raises(ValueError, match="x and y alone, got mask"):
        ours.FastlipPGD(classifier(model)).generate(inputs.numpy(), mask=np.ones((12, 12)))
