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
    for attack, message in (
        (ours.PGD(model, alpha="x"), "alpha must be"),
        (ours.PGDL2(model, alpha=float("inf")), "alpha must be"),
        (ours.PGD(model, steps=-1), "steps must be"),
        (ours.APGD(model, n_restarts=0), "n_restarts must be"),
        (ours.Square(model, n_queries=0), "n_queries must be"),
        (ours.Square(model, p_init=2.0), "p_init must lie"),
        (ours.APGD(model, eot_iter=0), "eot_iter must be"),
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


@pytest.mark.parametrize(
    ("name", "setting", "value", "options"),
    [
        ("PGD", "eps", 32 / 255, {"alpha": 0.1, "random_start": False}),
        ("PGD", "steps", 0, {"random_start": False}),
        ("PGD", "alpha", 0.0, {"random_start": False}),
        ("FGSM", "eps", 32 / 255, {}),
        ("PGDL2", "eps", 0.1, {"random_start": False}),
        ("Square", "eps", 1e-4, {"n_queries": 5}),
    ],
)
def test_settings_changed_after_construction_take_effect(trained, name, setting, value, options):
    model, inputs, labels = trained
    found = []
    for library in (torchattacks, ours):
        last = {} if library is torchattacks or name == "Square" else {"keep": "last"}
        attack = getattr(library, name)(model, **options | last)
        setattr(attack, setting, value)
        assert getattr(attack, setting) == value
        with torch.random.fork_rng(devices=[]):
            found.append((attack(inputs, labels) - inputs).flatten(1).norm(torch.inf, dim=1).max())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["APGD", "APGDT", "Square"])
def test_the_norm_and_renamed_settings_may_be_changed(trained, name):
    model, inputs, labels = trained
    attack = getattr(ours, name)(model, eps=0.1, **({"n_queries": 3} if name == "Square" else {"steps": 3}))
    attack.norm, attack.eps, attack.n_restarts = "L1", 1.0, 2
    assert attack.options["norm"] == "l1"
    assert attack.options["restarts"] == 2
    assert (attack(inputs, labels) - inputs).abs().flatten(1).sum(1).max() <= 1.0 + 1e-4
    if name == "APGDT":
        attack.n_classes = 3
        assert attack.options["target_classes"] == 2
    with pytest.raises(AttributeError, match="no setting 'epsilon'"):
        attack.epsilon = 0.1


@pytest.mark.parametrize("eps", [torch.linspace(0, 0.05, 32), torch.linspace(0, 0.05, 32).reshape(-1, 1, 1, 1)])
def test_tensors_as_options(trained, eps):
    model, inputs, labels = trained
    bounds = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    attack = ours.PGD(model, eps=eps, ids=torch.arange(32), bounds=bounds, keep="last")
    for _ in range(2):
        moved = (attack(inputs, labels) - inputs).abs().flatten(1).amax(1)
        assert (moved <= eps.flatten() + 1e-6).all()
        attack.eps = eps  # as scripts do for each batch
    assert moved[-1] > 0.04


def test_normalised_eight_bit_images(trained):
    """Undoing the normalisation of a black pixel gives a number below 0 by rounding."""
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    pixels = (255 * trained[1]).round() / 255
    pixels[:, :, :3] = 0
    normalised = (pixels - mean) / std
    assert (normalised * std + mean).min() < 0
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 10))
    labels = model(normalised).argmax(1)
    for name in ("FGSM", "PGD", "APGD", "Square"):
        attack = getattr(ours, name)(model, eps=0.1, **({"n_queries": 50} if name == "Square" else {}))
        attack.set_normalization_used(mean=mean.flatten().tolist(), std=std.flatten().tolist())
        found = attack(normalised, labels) * std + mean
        assert found.min() > -1e-6
        assert 0.05 < (found - pixels).abs().max() < 0.1 + 1e-6


def test_square_leaves_images_on_which_it_fails(trained):
    model, inputs, labels = trained
    found = ours.Square(model, eps=0.2, n_queries=100)(inputs, labels)
    fell = model(found).argmax(1) != labels
    assert 0 < fell.sum() < 32
    assert torch.equal(found[~fell], inputs[~fell])


def test_eot_averages_over_draws(trained):
    """Noise in the logits hides the gradient of a single pass."""
    model, inputs, labels = trained

    class Noisy(torch.nn.Module):
        passes = 0

        def forward(self, x):
            Noisy.passes += 1
            return model(x) * (1 + 0.01 * torch.randn(len(x), 1))

    ours.APGD(Noisy().eval(), eps=1e-4, steps=2, eot_iter=5)(inputs, labels)
    several = Noisy.passes
    ours.APGD(Noisy().eval(), eps=1e-4, steps=2)(inputs, labels)
    assert several > 3 * (Noisy.passes - several)
