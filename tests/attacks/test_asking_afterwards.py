"""Images that leave on a faster copy's word: the model is asked about all of them at the end, and is what counts."""

import pytest
import torch
from torch import Tensor, nn

from fastlip import attacks
from fastlip.attacks._loop import AttackLoop

ATTACKS = pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
SETTINGS = {"eps": 0.02, "steps": 12, "loss": "ce"}


class Counted(nn.Module):
    """A small network that notes the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.net(x)


def case(count: int = 40) -> tuple[Counted, Tensor, Tensor]:
    model = Counted().eval()
    x = torch.rand(count, 3, 8, 8)
    with torch.no_grad():
        model.net[3].bias -= model(x).mean(0)  # or else most labels are alike
        y = model(x).argmax(1)
    model.sizes.clear()
    return model, x, y


def copy_that_errs(model: Counted, by: float) -> attacks.Network:
    """The model's logits, shifted: some of what the copy calls adversarial is not, and the other way round."""
    shift = by * torch.linspace(-1.0, 1.0, 5)
    return attacks.Network(model, faster=lambda x: model.net(x) + shift.to(x.dtype), rounding=0.0)


def out_of_top_2(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.topk(2, 1).indices != labels[:, None]).all(1)


def seeded() -> dict[str, torch.Generator]:
    return {"generator": torch.Generator().manual_seed(0)}


def is_adversarial(model: Counted, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model.net(x).argmax(1) != y


@ATTACKS
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_true_copy_is_asked_about_once(attack, norm) -> None:
    model, x, y = case()
    settings = SETTINGS | {"norm": norm, "eps": {"linf": 0.02, "l2": 0.1, "l1": 1.0}[norm]}
    plain = attack(model, x, y, **settings, **seeded())
    model.sizes.clear()
    fast = attack(copy_that_errs(model, 0.0), x, y, **settings, **seeded())
    torch.testing.assert_close(fast, plain)
    fallen = is_adversarial(model, fast, y)
    assert 5 < fallen.sum() < 40
    assert len(model.sizes) <= 2
    assert sum(model.sizes) == fallen.sum()


@ATTACKS
@pytest.mark.parametrize("by", [0.02, 0.1, 0.5])
def test_the_model_decides_and_refuted_images_go_on(attack, by) -> None:
    model, x, y = case()
    network = copy_that_errs(model, by)
    found = attack(network, x, y, **SETTINGS, **seeded())
    assert ((found - x).abs() <= 0.02 + 1e-6).all()
    adversarial = is_adversarial(model, found, y)
    at_best = is_adversarial(model, attack(model, x, y, **SETTINGS, **seeded()), y)
    # The gradients of cross-entropy differ a little, so that a few may fall here and not there.
    assert adversarial.sum() >= at_best.sum() - 5
    with torch.no_grad():
        trusted = network.faster(found).argmax(1) != y
    assert (trusted != adversarial).any()
    assert not (adversarial & (found == x).flatten(1).all(1)).any()


@ATTACKS
def test_an_image_does_not_depend_on_its_batch(attack) -> None:
    """Nor on how many others the copy is wrong about."""
    model, x, y = case(24)
    network = copy_that_errs(model, 0.1)
    ids = torch.arange(len(x))
    together = attack(network, x, y, ids=ids, **SETTINGS, **seeded())
    for part in (slice(0, 1), slice(5, 12), slice(20, 24)):
        alone = attack(network, x[part], y[part], ids=ids[part], **SETTINGS, **seeded())
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-6)


@ATTACKS
def test_restarts_take_up_those_that_the_model_classifies(attack) -> None:
    model, x, y = case()
    network = copy_that_errs(model, 0.1)
    once = is_adversarial(model, attack(network, x, y, **SETTINGS, **seeded()), y)
    more = is_adversarial(model, attack(network, x, y, restarts=3, **SETTINGS, **seeded()), y)
    assert (more | ~once).all()


@ATTACKS
def test_a_callback_hears_of_each_iterate_once(attack) -> None:
    model, x, y = case()
    heard: list[tuple[int, int]] = []

    def callback(iteration: attacks.Iteration) -> None:
        heard.extend((iteration.step, row) for row in iteration.rows.tolist())

    found = attack(copy_that_errs(model, 0.1), x, y, callback=callback, **SETTINGS, **seeded())
    assert is_adversarial(model, found, y).any()
    assert len(heard) == len(set(heard))


@pytest.mark.parametrize("by", [0.05, 0.5, 50.0])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (attacks.pgd, {}),
        (attacks.pgd, {"random_start": False}),
        (attacks.pgd, {"restarts": 2, "quantize": 8}),
        (attacks.pgd, {"criterion": out_of_top_2}),
        (attacks.apgd, {"restarts": 2}),
        (attacks.apgd, {"larger_eps": True}),
        (attacks.apgd, {"target_classes": 2, "loss": "dlr"}),
        (attacks.fgsm, {}),
    ],
    ids=["pgd", "from inputs", "on a grid", "criterion", "apgd", "larger balls", "targets", "fgsm"],
)
def test_a_run_taken_again_is_one_with_the_model_asked_at_each_iterate(attack, options, norm, by, monkeypatch) -> None:
    model, x, y = case(20)
    x = (x * 255).round().double() / 255  # in float64, where the sizes of batches make no difference that counts
    with torch.no_grad():
        y = model.double()(x).argmax(1)
    y[3] = (y[3] + 1) % 5
    active = torch.arange(20) != 5
    settings = {"norm": norm, "eps": {"linf": 0.02, "l2": 0.1, "l1": 1.0}[norm], "active": active} | options
    if attack is not attacks.fgsm:
        settings = {"steps": 12, "loss": "ce"} | settings
    drawn = (lambda: {}) if attack is attacks.fgsm else seeded
    network = copy_that_errs(model, by)
    found = attack(network, x, y, **settings, **drawn())
    monkeypatch.setattr(AttackLoop, "_may_ask_afterwards", lambda *_: False)
    monkeypatch.setattr("fastlip.attacks._loop._PATIENCE", 0)
    wanted = attack(network, x, y, **settings, **drawn())
    assert torch.equal(found[5], x[5])
    fooled = options.get("criterion", lambda logits, labels: logits.argmax(1) != labels)
    with torch.no_grad():
        adversarial, at_once = (fooled(model.net(images), y) for images in (found, wanted))
    assert torch.equal(adversarial, at_once)
    # On a grid what was refuted may be returned for an image that stays robust, in place of an earlier iterate.
    same = adversarial if "quantize" in options else torch.ones_like(adversarial)
    torch.testing.assert_close(found[same], wanted[same], rtol=0, atol=1e-9)


def test_images_that_are_misclassified_to_begin_with_stay() -> None:
    model, x, y = case()
    y[:3] = (y[:3] + 1) % 5
    for random_start in (False, True):
        found = attacks.pgd(copy_that_errs(model, 0.0), x, y, random_start=random_start, **SETTINGS, **seeded())
        assert torch.equal(found[:3], x[:3])


@pytest.mark.parametrize("by", [0.0, 0.1])
def test_other_attacks_over_the_same_loop(by) -> None:
    model, x, y = case()
    network = copy_that_errs(model, by)
    aimed = attacks.apgd(network, x, y, target_classes=3, **(SETTINGS | {"loss": "dlr"}), **seeded())
    assert is_adversarial(model, aimed, y).sum() > 5
    targets = (y + 1) % 5
    towards = attacks.pgd(network, x, y, targets=targets, **(SETTINGS | {"eps": 0.1}), **seeded())
    with torch.no_grad():
        reached = model.net(towards).argmax(1) == targets
    assert reached.any()
    smallest = attacks.min_norm(network, x, y, norm="l2", method="search")
    assert is_adversarial(model, smallest.adversarial[smallest.found], y[smallest.found]).all()
