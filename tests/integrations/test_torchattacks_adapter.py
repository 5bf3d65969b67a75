import pytest
import torch

from fastlip import attacks

torchattacks = pytest.importorskip("torchattacks")
from fastlip.integrations import torchattacks as ours  # noqa: E402

EPS, ALPHA = 0.08, 0.02


def test_pgd_is_torchattacks_bit_for_bit(trained):
    model, inputs, labels = trained
    want = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=10, random_start=False)(inputs, labels)
    found = ours.PGD(model, eps=EPS, alpha=ALPHA, steps=10, random_start=False, keep="last")(inputs, labels)
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FGSM", {"eps": EPS}),
        ("PGD", {"eps": EPS, "alpha": ALPHA, "steps": 10, "random_start": False}),
        ("PGDL2", {"eps": 1.2, "alpha": 0.2, "steps": 10, "random_start": False}),
        ("APGD", {"eps": EPS, "steps": 10}),
        ("APGDT", {"eps": EPS, "steps": 10, "n_classes": 4}),
        ("Square", {"eps": 0.2, "n_queries": 300}),
    ],
)
def test_same_call_and_no_weaker(trained, name, options):
    model, inputs, labels = trained
    with torch.random.fork_rng(devices=[]):
        peer = getattr(torchattacks, name)(model, **options)(inputs, labels)
    attack = getattr(ours, name)(model, **options)
    assert isinstance(attack, torchattacks.attack.Attack)
    found = attack(inputs, labels)
    standing = [(model(x).argmax(1) == labels).sum().item() for x in (found, peer)]
    slack = 6 if name == "Square" else 1  # two random searches
    assert standing[0] <= standing[1] + slack
    assert standing[0] < 32
    assert name in repr(attack)


def test_targeted_mode(trained):
    model, inputs, labels = trained
    attack = ours.PGD(model, eps=0.3, alpha=0.03, steps=30)
    attack.set_mode_targeted_by_function(lambda x, y: (y + 3) % 10, quiet=True)
    assert (model(attack(inputs, labels)).argmax(1) == (labels + 3) % 10).float().mean() > 0.8


def test_normalisation_used(trained):
    """Torchattacks lets users attack normalised images of a model that does not normalise."""
    _, inputs, labels = trained
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    centre = torch.tensor(mean).reshape(1, 3, 1, 1)
    inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 10))

    for library in (torchattacks, ours):
        options = {} if library is torchattacks else {"keep": "last"}
        attack = library.PGD(inner, eps=EPS, alpha=ALPHA, steps=3, random_start=False, **options)
        attack.set_normalization_used(mean=mean, std=std)
        found = attack((inputs - centre) / 0.25, labels)
        if library is torchattacks:
            want = found
    torch.testing.assert_close(found, want)
    fast = ours.PGD(inner, eps=EPS, alpha=ALPHA, steps=3, random_start=False, keep="last", fast=True)
    fast.set_normalization_used(mean=mean, std=std)
    for _ in range(2):
        torch.testing.assert_close(fast((inputs - centre) / 0.25, labels), want)
    assert not attacks.prepare(fast._made, inputs).exact


def test_frozen_batch_norm_stays_frozen(trained):
    model, inputs, labels = trained
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    ours.PGD(model, eps=EPS, steps=2)(inputs, labels)
    assert modes == [m.training for m in model.modules()]
    model.eval()


def test_seeded_attacks_repeat(trained):
    model, inputs, labels = trained
    attack = ours.APGD(model, eps=0.02, steps=3)
    state = torch.get_rng_state()
    assert torch.equal(attack(inputs, labels), attack(inputs, labels))
    assert torch.equal(torch.get_rng_state(), state)


def test_l1_and_speed_ups(trained):
    model, inputs, labels = trained
    found = ours.PGDL1(model, eps=8.0, steps=10, fast=True, precision=torch.bfloat16)(inputs, labels)
    assert ((found - inputs).abs().flatten(1).sum(1) <= 8.0 + 1e-3).all()
    assert (model(found).argmax(1) != labels).any()


def test_errors(trained):
    model, inputs, labels = trained
    with pytest.raises(ValueError, match="norm must be"):
        ours.APGD(model, norm="L0")
    with pytest.raises(ValueError, match="eot_iter"):
        ours.APGD(model, eot_iter=2)
    for attack, message in (
        (ours.PGD(model, alpha="x"), "alpha must be"),
        (ours.PGDL2(model, alpha=float("inf")), "alpha must be"),
        (ours.PGD(model, steps=-1), "steps must be"),
        (ours.APGD(model, n_restarts=0), "n_restarts must be"),
        (ours.Square(model, n_queries=0), "n_queries must be"),
        (ours.Square(model, p_init=2.0), "p_init must lie"),
        (ours.FastlipAttack(attacks.square, model, eps=0.1, queries=0), "queries must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            attack(inputs, labels)
    with pytest.raises(ValueError, match="n_classes must be"):
        ours.APGDT(model, n_classes=0)
    attack = ours.PGD(model)
    attack.set_model_training_mode(model_training=True)
    with pytest.raises(ValueError, match="eval mode"):
        attack(inputs, labels)
