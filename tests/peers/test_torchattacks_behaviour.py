"""What users of torchattacks rely on, asked of torchattacks itself and of our classes of the same names."""

import copy
import importlib

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
peer = pytest.importorskip("torchattacks")

EPS = 0.08
#: Classes that both libraries have, with settings under which few steps suffice.
CLASSES = {
    "FGSM": {"eps": EPS},
    "PGD": {"eps": EPS, "alpha": EPS / 4, "steps": 6},
    "PGDL2": {"eps": 1.5, "alpha": 0.4, "steps": 6},
    "APGD": {"eps": EPS, "steps": 6},
    "APGDT": {"eps": EPS, "steps": 4, "n_classes": 4},
    "Square": {"eps": 5 * EPS, "n_queries": 60},
}


@pytest.fixture(params=["torchattacks", "fastlip.integrations.torchattacks"])
def library(request):
    return importlib.import_module(request.param)


@pytest.fixture
def problem(trained_cnn):
    model, images, labels = trained_cnn
    return copy.deepcopy(model), images.clone(), labels.clone()


@pytest.mark.parametrize("name", list(CLASSES))
def test_images_in_images_out(library, problem, name):
    model, images, labels = problem
    before = images.clone(), labels.clone()
    attack = getattr(library, name)(model, **CLASSES[name])
    assert isinstance(attack, peer.attack.Attack)
    found = attack(images, labels).detach()
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    assert found.min() >= 0
    assert found.max() <= 1
    moved = (found - images).flatten(1)
    length = moved.norm(dim=1) if name == "PGDL2" else moved.abs().amax(1)
    assert (length <= CLASSES[name]["eps"] + 1e-5).all()
    assert (model(found).argmax(1) == labels).float().mean() < 0.9
    one = attack(images[:1], labels[:1])
    assert one.shape == images[:1].shape


@pytest.mark.parametrize("name", ["FGSM", "PGD", "APGD", "Square"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(library, problem, name, training):
    model, images, labels = problem
    model.train(training)
    state = copy.deepcopy(model.state_dict())
    getattr(library, name)(model, **CLASSES[name])(images, labels)
    assert model.training is training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_targeted_modes(library, problem):
    model, images, labels = problem
    attack = library.PGD(model, eps=0.3, alpha=0.05, steps=15)
    targets = (labels + 1) % 10
    attack.set_mode_targeted_by_label(quiet=True)
    reached = model(attack(images, targets)).argmax(1)
    assert (reached == targets).float().mean() > 0.5
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
    assert (model(attack(images, labels)).argmax(1) == targets).float().mean() > 0.5
    attack.set_mode_targeted_random(quiet=True)
    assert (model(attack(images, labels)).argmax(1) != labels).float().mean() > 0.5
    attack.set_mode_targeted_least_likely(kth_min=1, quiet=True)
    least = model(images).argmin(1)
    assert (model(attack(images, labels)).argmax(1) == least).float().mean() > 0.3
    assert attack.get_mode() == "targeted(least-likely)"
    attack.set_mode_default()
    assert attack.get_mode() == "default"
    assert attack.targeted is False
    assert (model(attack(images, labels)).argmax(1) != labels).float().mean() > 0.5


def test_a_mode_that_an_attack_has_not(library, problem):
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        library.APGDT(problem[0], eps=EPS, steps=2).set_mode_targeted_by_label(quiet=True)


def test_settings_can_be_read_and_changed(library, problem):
    model, images, labels = problem
    attack = library.PGD(model, eps=EPS, alpha=0.01, steps=2, random_start=False)
    assert (attack.eps, attack.alpha, attack.steps, attack.random_start) == (EPS, 0.01, 2, False)
    assert str(EPS) in repr(attack)
    near = attack(images, labels)
    attack.alpha, attack.eps = 0.001, 0.001
    assert (attack(images, labels) - images).abs().max() <= 0.001 + 1e-6
    attack.eps, attack.alpha = EPS, 0.01
    assert torch.equal(attack(images, labels), near)


def test_another_model_may_be_set(library, problem):
    model, images, labels = problem
    attack = library.PGD(model, eps=EPS, alpha=EPS / 4, steps=6, random_start=False)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other[-1].weight)
    attack.set_model(other)
    want = library.PGD(other, eps=EPS, alpha=EPS / 4, steps=6, random_start=False)(images, labels)
    assert torch.equal(attack(images, labels), want)
    attack.set_device(torch.device("cpu"))
    assert torch.equal(attack(images, labels), want)


def test_images_that_were_normalised(library, problem):
    model, images, labels = problem
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))

    class Normalised(torch.nn.Module):
        """Takes normalised images, as published models do."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, z):
            return self.inner(z * s + m)

    attack = library.PGD(Normalised(), eps=EPS, alpha=EPS / 4, steps=6, random_start=False)
    attack.set_normalization_used(mean=mean, std=std)
    found = attack((images - m) / s, labels) * s + m
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
    assert ((found - images).abs() <= EPS + 1e-5).all()
    assert (model(found).argmax(1) != labels).float().mean() > 0.3


def test_saving_and_loading(library, problem, tmp_path):
    model, images, labels = problem
    loader = DataLoader(TensorDataset(images, labels), batch_size=9)
    attack = library.PGD(model, eps=EPS, alpha=EPS / 4, steps=6)
    path = str(tmp_path / "adversarial.pt")
    accuracy, l2, seconds = attack.save(
        loader, save_path=path, verbose=False, return_verbose=True, save_predictions=True, save_clean_inputs=True
    )
    assert 0 <= float(accuracy) < 100
    assert l2 > 0
    assert seconds >= 0
    kept = torch.load(path)
    assert torch.equal(kept["labels"], labels)
    assert torch.equal(kept["clean_inputs"], images)
    standing = (model(kept["adv_inputs"]).argmax(1) == labels).float().mean()
    assert standing == pytest.approx(float(accuracy) / 100, abs=1e-6)
    again = attack.load(path, batch_size=5)
    assert torch.equal(torch.cat([x for x, _ in again]), kept["adv_inputs"])


def test_several_attacks_in_one(library, problem):
    model, images, labels = problem
    first = library.FGSM(model, eps=EPS)
    second = library.PGD(model, eps=EPS, alpha=EPS / 4, steps=8, random_start=False)
    both = peer.MultiAttack([first, second])
    standing = [(model(attack(images, labels)).argmax(1) == labels).sum() for attack in (first, second, both)]
    assert standing[2] <= min(standing[:2])


def test_weights_that_want_no_gradient(library, problem):
    model, images, labels = problem
    model.requires_grad_(False)
    found = library.PGD(model, eps=EPS, alpha=EPS / 4, steps=6)(images, labels)
    assert (model(found).argmax(1) != labels).float().mean() > 0.3
    assert not any(p.requires_grad for p in model.parameters())


def test_no_weaker_than_the_peer(problem):
    """Each class of ours leaves at most one image more standing; random starts, which differ, are left out."""
    model, images, labels = problem
    ours = importlib.import_module("fastlip.integrations.torchattacks")
    for name, options in CLASSES.items():
        options = options | ({"random_start": False} if name.startswith("PGD") else {})
        standing = []
        for library in (peer, ours):
            torch.manual_seed(0)
            found = getattr(library, name)(model, **options)(images, labels)
            standing.append(int((model(found).argmax(1) == labels).sum()))
        assert standing[1] <= standing[0] + (4 if name == "Square" else 1), (name, standing)


def test_random_starts_follow_the_global_seed(library, problem):
    model, images, labels = problem
    attack = library.PGD(model, eps=EPS, alpha=0.001, steps=1)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(attack(images, labels))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
