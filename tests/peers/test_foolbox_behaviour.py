"""What users of foolbox rely on, asked of foolbox itself and of our classes of the same names."""

import copy
import importlib

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
peer = pytest.importorskip("foolbox")
eagerpy = pytest.importorskip("eagerpy")

EPS = 0.1


@pytest.fixture(params=["foolbox.attacks", "fastlip.integrations.foolbox"])
def library(request):
    return importlib.import_module(request.param)


@pytest.fixture
def problem(trained_cnn):
    model, images, labels = trained_cnn
    model = copy.deepcopy(model)
    return peer.PyTorchModel(model, bounds=(0, 1), device="cpu"), images.clone(), labels.clone()


def minimal(library):
    """An attack that looks for the nearest adversarial image."""
    if library.__name__.startswith("foolbox"):
        return library.L2FMNAttack(steps=30)
    return library.MinNorm("l2", method="fmn", fmn_steps=30)


@pytest.mark.parametrize("name", ["LinfPGD", "L2PGD"])
def test_one_radius_and_several(library, problem, name):
    fmodel, images, labels = problem
    attack = getattr(library, name)(steps=8)
    radii = [0.0, EPS, 3 * EPS] if name == "LinfPGD" else [0.0, 1.0, 4.0]
    raw, clipped, success = attack(fmodel, images, labels, epsilons=radii[1])
    assert raw.shape == clipped.shape == images.shape
    assert success.shape == (32,)
    assert success.dtype == torch.bool
    raws, clippeds, successes = attack(fmodel, images, labels, epsilons=radii)
    assert len(raws) == len(clippeds) == 3
    assert successes.shape == (3, 32)
    for radius, found, fell in zip(radii, clippeds, successes, strict=True):
        length = attack.distance(images, found)
        assert (length <= radius + 1e-5).all()
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(fell, fmodel(found).argmax(1) != labels)
        assert peer.accuracy(fmodel, found, labels) == pytest.approx(1 - fell.float().mean().item())
    assert not successes[0].any()
    assert successes[1].sum() <= successes[2].sum()
    assert successes[2].any()


def test_criteria(library, problem):
    fmodel, images, labels = problem
    attack = library.LinfPGD(steps=15)
    by_labels = attack(fmodel, images, peer.Misclassification(labels), epsilons=2 * EPS)[2]
    assert by_labels.float().mean() > 0.5
    targets = (labels + 1) % 10
    _, found, success = attack(fmodel, images, peer.TargetedMisclassification(targets), epsilons=4 * EPS)
    assert torch.equal(success, fmodel(found).argmax(1) == targets)
    assert success.float().mean() > 0.5
    both = peer.Misclassification(labels) & peer.TargetedMisclassification(targets)
    with pytest.raises(ValueError, match="criterion"):
        attack(fmodel, images, both, epsilons=EPS)


def test_native_tensors_and_eagerpy_s(library, problem):
    fmodel, images, labels = problem
    attack = library.LinfPGD(steps=4, random_start=False)
    raw = attack(fmodel, images, labels, epsilons=EPS)[0]
    wrapped = attack(fmodel, eagerpy.astensor(images), eagerpy.astensor(labels), epsilons=EPS)
    assert isinstance(raw, torch.Tensor)
    assert all(isinstance(part, eagerpy.Tensor) for part in wrapped)
    assert torch.equal(wrapped[0].raw, raw)


def test_repeating(library, problem):
    fmodel, images, labels = problem
    attack = library.LinfPGD(steps=2, rel_stepsize=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        once = attack(fmodel, images, labels, epsilons=EPS)[2].sum()
        torch.manual_seed(0)
        _, clipped, thrice = attack.repeat(3)(fmodel, images, labels, epsilons=EPS)
    assert thrice.sum() >= once
    assert torch.equal(thrice, fmodel(clipped).argmax(1) != labels)


def test_preprocessing_and_other_bounds(library, problem):
    fmodel, images, labels = problem
    mean, std = [0.1, 0.0, -0.1], [0.9, 1.0, 1.1]
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    inner = fmodel._model

    class Raw(torch.nn.Module):
        def forward(self, z):
            return inner(z * s + m)

    made = peer.PyTorchModel(Raw(), (0, 1), device="cpu", preprocessing={"mean": mean, "std": std, "axis": -3})
    wide = made.transform_bounds((0, 255))
    assert torch.allclose(wide(255 * images), fmodel(images), atol=1e-3)
    attack = library.LinfPGD(steps=10, random_start=False)
    _, found, success = attack(wide, 255 * images, labels, epsilons=255 * EPS)
    assert (found - 255 * images).abs().max() <= 255 * EPS + 1e-2
    assert found.max() <= 255
    assert found.max() > 2
    narrow = attack(fmodel, images, labels, epsilons=EPS)[2]
    assert (success != narrow).sum() <= 1


def test_nearest_images(library, problem):
    fmodel, images, labels = problem
    attack = minimal(library)
    raw, clipped, success = attack(fmodel, images, labels, epsilons=None)
    assert torch.equal(success, fmodel(clipped).argmax(1) != labels)
    assert success.float().mean() > 0.8
    lengths = attack.distance(images, raw)[success]
    assert (lengths > 0).all()
    radii = [0.0, lengths.median().item(), lengths.max().item() + 0.1]
    _, clippeds, successes = attack(fmodel, images, labels, epsilons=radii)
    assert successes.sum(1).tolist() == sorted(successes.sum(1).tolist())
    assert not successes[0].any()
    for radius, found in zip(radii, clippeds, strict=True):
        assert (attack.distance(images, found) <= radius + 1e-4).all()


def test_images_outside_of_the_bounds_are_refused(library, problem):
    fmodel, images, labels = problem
    with pytest.raises((AssertionError, ValueError)):
        library.LinfPGD(steps=1)(fmodel, 3 * images, labels, epsilons=EPS)


def test_inputs_are_left_alone(library, problem):
    fmodel, images, labels = problem
    before = images.clone(), labels.clone()
    for attack in (library.LinfPGD(steps=2), minimal(library)):
        attack(fmodel, images, labels, epsilons=EPS)
        assert torch.equal(images, before[0])
        assert torch.equal(labels, before[1])
        assert not images.requires_grad


def test_no_radius_for_an_attack_in_a_ball(library, problem):
    fmodel, images, labels = problem
    with pytest.raises(NotImplementedError, match="None"):
        library.LinfPGD(steps=1)(fmodel, images, labels, epsilons=None)


def test_an_attack_says_what_it_is(library):
    attack = library.LinfPGD(steps=7)
    assert attack.steps == 7
    assert "LinfPGD" in repr(attack) or "ProjectedGradient" in repr(attack)
    assert "7" in repr(attack)
    assert attack.distance == peer.distances.linf


def test_what_is_misclassified_already_is_a_success(library, problem):
    fmodel, images, labels = problem
    wrong = labels.clone()
    wrong[:5] = (wrong[:5] + 1) % 10
    success = library.LinfPGD(steps=1, rel_stepsize=1e-6, random_start=False)(fmodel, images, wrong, epsilons=1e-6)[2]
    assert success.tolist() == [True] * 5 + [False] * 27
    raw, _, found = minimal(library)(fmodel, images, wrong, epsilons=None)
    assert found[:5].all()
    assert (raw[:5] - images[:5]).abs().max() < 1e-5
