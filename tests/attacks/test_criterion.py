"""Criteria of one's own, and what a state knows functions by."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.attacks._saved import described
from fastlip.integrations import autoattack

EPS = 0.065


def wrong(logits, labels):
    return logits.argmax(1) != labels


def out_of_top_3(logits, labels):
    return (logits.topk(3, 1).indices != labels[:, None]).all(1)


def sure_of_another(logits, labels):
    """Confidence of 0.9 in another class."""
    return (logits.softmax(1).scatter(1, labels[:, None], 0).amax(1) >= 0.9) & wrong(logits, labels)


def undetected(logits, labels):
    """Another class than the last one, which rejects."""
    return wrong(logits, labels) & (logits.argmax(1) != logits.shape[1] - 1)


CRITERIA = [out_of_top_3, sure_of_another, undetected]


def calls(**options):
    draws = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    return {
        "pgd": lambda *m: attacks.pgd(*m, eps=EPS, steps=6, loss="ce", generator=draws(), **options),
        "fgsm": lambda *m: attacks.fgsm(*m, eps=EPS, loss="ce", **options),
        "apgd": lambda *m: attacks.apgd(*m, eps=EPS, steps=8, loss="ce", generator=draws(), **options),
        "apgd-t": lambda *m: attacks.apgd(*m, eps=EPS, steps=4, target_classes=2, generator=draws(), **options),
        "square": lambda *m: attacks.square(*m, eps=0.3, queries=40, generator=draws(), **options),
        "fmn": lambda *m: attacks.min_norm(*m, norm="linf", method="fmn", fmn_steps=20, **options).adversarial,
        "search": lambda *m: attacks.min_norm(*m, method="search", steps=4, search_steps=5, **options).adversarial,
        "sigma": lambda *m: (
            attacks.min_sigma(
                *m, directions=2, levels=4, generator=draws(), **{k: v for k, v in options.items() if k != "fast"}
            ).adversarial
        ),
    }


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("attack", list(calls()))
def test_a_wrong_decision_as_a_criterion_is_what_attacks_look_for(cnn_problem, attack, fast):
    found = calls(criterion=wrong, fast=fast)[attack](*cnn_problem)
    assert torch.equal(found, calls(fast=fast)[attack](*cnn_problem))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("attack", ["pgd", "apgd", "apgd-t", "square", "fmn", "search"])
def test_success_is_what_the_criterion_says(cnn_problem, attack, criterion):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[:8] = (labels[:8] + 1) % 10  # of which some fool the model as they are, by some criteria
    found = calls(criterion=criterion)[attack](model, inputs, labels)
    before, after = criterion(model(inputs), labels), criterion(model(found), labels)
    assert torch.equal(found[before], inputs[before]), "nothing is left to do"
    assert after[before].all()
    plain = calls()[attack](model, inputs, labels)
    assert int(after.sum()) >= int(criterion(model(plain), labels).sum())
    if attack != "fmn" and criterion is not out_of_top_3:
        assert int(after.sum()) > int(before.sum())
    fallen = after & ~before
    moved = (found != inputs).flatten(1).any(1)
    if attack in ("fmn", "search"):
        assert torch.equal(moved, fallen)


def test_a_criterion_stands_in_the_way_of_early_stopping(cnn_problem):
    """An image goes on past its first wrong decision, until the criterion holds."""
    model, inputs, labels = cnn_problem
    seen = []
    attacks.pgd(model, inputs, labels, eps=EPS, criterion=sure_of_another, callback=seen.append, random_start=False)
    met = 0
    for now, then in itertools.pairwise(seen):
        logits = model(now.images)
        said = sure_of_another(logits, labels[now.rows])
        assert torch.equal(said, now.adversarial)
        assert not set(now.rows[said].tolist()) & set(then.rows.tolist())
        met += int((wrong(logits, labels[now.rows]) & ~said).sum())
    assert met > 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_smallest_perturbations_hold_alone(cnn_problem, criterion):
    model, inputs, labels = cnn_problem
    found = attacks.min_norm(model, inputs, labels, norm="linf", method="both", steps=4, search_steps=5, fmn_steps=20,
                             criterion=criterion)  # fmt: skip
    assert found.found.sum() > 8
    alone = torch.cat([criterion(model(x[None]), y[None]) for x, y in zip(found.adversarial, labels, strict=True)])
    assert torch.equal(alone, found.found)
    nearest = attacks.min_norm(model, inputs, labels, norm="linf", method="both", steps=4, search_steps=5, fmn_steps=20)
    assert (found.distance >= 0.9 * nearest.distance).all(), "a wrong decision is part of all of them"


def test_one_logit_is_given_as_two(cnn_problem):
    model, inputs, labels = cnn_problem
    shapes = []

    def fooled(logits, labels):
        shapes.append(tuple(logits.shape))
        return (logits[:, 1].sigmoid() > 0.7) != (labels == 1)

    binary = lambda x: (lambda z: z[:, 1] - z[:, 0])(model(x))  # noqa: E731
    found = attacks.pgd(binary, inputs, (labels == 1).long(), eps=EPS, criterion=fooled)
    assert set(n for _, n in shapes) == {2}
    assert fooled(attacks_logits(binary, found), (labels == 1).long()).any()


def attacks_logits(model, x):
    z = model(x)
    return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_evaluate_judges_by_the_criterion(cnn_problem, criterion):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[:8] = (labels[:8] + 1) % 10

    def others(model, x, y):  # an attack that takes no criterion
        return attacks.pgd(model, x, y, eps=EPS, loss="ce", keep="last", random_start=False, steps=20)

    suite = {"pgd": partial(attacks.pgd, eps=EPS, steps=6, loss="ce"), "others": others}
    found = attacks.evaluate(model, inputs, labels, suite, criterion=criterion, norm="linf", eps=EPS)
    before, after = criterion(model(inputs), labels), criterion(model(found.adversarial), labels)
    assert torch.equal(found.clean, ~before)
    assert torch.equal(found.robust, ~after)
    assert torch.equal(found.success.any(0), after & ~before)
    alone = attacks.pgd(model, inputs, labels, eps=EPS, steps=6, loss="ce", criterion=criterion,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert torch.equal(found.success[0], criterion(model(alone), labels) & ~before), "the attack looked for it"


def test_a_criterion_of_targets(cnn_problem):
    """The loss aims at the target, and the criterion says how surely it is to be reached."""
    model, inputs, labels = cnn_problem
    targets = (labels + 1) % 10

    def sure(logits, labels):
        return logits.softmax(1).gather(1, ((labels + 1) % 10)[:, None])[:, 0] > 0.9

    found = attacks.apgd(model, inputs, labels, eps=0.1, targets=targets, criterion=sure, steps=20)
    weak = attacks.apgd(model, inputs, labels, eps=0.1, targets=targets, steps=20)
    reached = sure(model(found), labels)
    assert reached.sum() > sure(model(weak), labels).sum()


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (lambda z, y: z[:, 0], ValueError, r"criterion must return a bool for each image, \[32\], got torch.float32"),
        (lambda z, y: z > 0, ValueError, "criterion must return a bool"),
        (lambda z, y: True, ValueError, "got bool"),
        (3, TypeError, "criterion must be a function"),
        (nn.CrossEntropyLoss, TypeError, "criterion must be a function .* got CrossEntropyLoss"),
    ],
)
def test_what_is_no_criterion(cnn_problem, criterion, error, message):
    for attack in (attacks.pgd, attacks.fgsm, attacks.apgd, attacks.square):
        with pytest.raises(error, match=message):
            attack(*cnn_problem, eps=EPS, criterion=criterion)
    for attack in (attacks.min_norm, attacks.min_sigma):
        with pytest.raises(error, match=message):
            attack(*cnn_problem, criterion=criterion)
    with pytest.raises(error, match=message):
        attacks.evaluate(*cnn_problem, {}, criterion=criterion)


def test_no_number_is_no_decision(cnn_problem):
    model, inputs, labels = cnn_problem
    found = attacks.evaluate(lambda x: model(x) * torch.nan, inputs, labels, {}, check=False,
                             criterion=lambda z, y: torch.ones_like(y, dtype=torch.bool))  # fmt: skip
    assert found.clean.all()


# What a state knows functions by.


def by_sum(logits, labels):
    return logits.sum(1)


def test_functions_without_a_name_have_no_state(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem
    path = tmp_path / "state"
    pgd = partial(attacks.pgd, eps=0.02, steps=1)
    for suite, options, name in (
        ({"mine": lambda m, x, y: x}, {}, r"attacks\['mine'\]"),
        ({"mine": partial(pgd, loss=lambda z, y: z[:, 0])}, {}, r"attacks\['mine'\]"),
        ({"pgd": pgd}, {"criterion": lambda z, y: wrong(z, y)}, "criterion"),
        ({"pgd": pgd}, {"bounds": lambda x: (0.0, 1.0)}, "bounds"),
    ):
        attacks.evaluate(model, inputs, labels, suite, **options)
        with pytest.raises(ValueError, match=f"^state needs a name for {name}, which holds the function .*<lambda>"):
            attacks.evaluate(model, inputs, labels, suite, **options, state=path)
    assert not path.exists()


def test_a_function_may_be_given_a_name(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem

    def at(level):
        def sure(logits, labels):
            return wrong(logits, labels) & (logits.softmax(1).amax(1) > level)

        sure.state_name = f"sure, {level}"
        return sure

    suite = {"pgd": partial(attacks.pgd, eps=EPS, steps=3)}
    options = {"state": tmp_path / "state", "norm": "linf", "eps": EPS}
    want = attacks.evaluate(model, inputs, labels, suite, criterion=at(0.6), **options)
    again = attacks.evaluate(model, inputs, labels, suite, criterion=at(0.6), **options)
    assert torch.equal(again.success, want.success)
    for other in (at(0.7), None, wrong):
        with pytest.raises(ValueError, match="state belongs to other images, attacks or settings"):
            attacks.evaluate(model, inputs, labels, suite, criterion=other, **options)


class Sure:
    def __init__(self, level):
        self.level = level

    def __call__(self, logits, labels):
        return wrong(logits, labels) & (logits.softmax(1).amax(1) > self.level)

    def method(self, logits, labels):
        return self(logits, labels)


def test_objects_are_known_by_what_they_hold():
    """Equal ones are the same in another process; none of these has an address in its description."""
    smooth = partial(nn.CrossEntropyLoss, reduction="none")
    for one, same, other in (
        (Sure(0.6), Sure(0.6), Sure(0.7)),
        (Sure(0.6).method, Sure(0.6).method, Sure(0.7).method),
        (smooth(), smooth(), smooth(label_smoothing=0.1)),
        (smooth(weight=torch.ones(3)), smooth(weight=torch.ones(3)), smooth(weight=torch.arange(3.0))),
        (partial(by_sum, k=1), partial(by_sum, k=1), partial(by_sum, k=2)),
        (partial(by_sum, 1), partial(by_sum, 1), partial(by_sum, 2)),
        (by_sum, by_sum, wrong),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        ({"a": {1, 2}}, {"a": {2, 1}}, {"a": {1, 3}}),
        (torch.zeros(2000), torch.zeros(2000), torch.zeros(2000).index_fill(0, torch.tensor([999]), 1)),
    ):
        shown = [str(_digest(described(value, "it"))) for value in (one, same, other)]
        assert shown[0] == shown[1] != shown[2]
    itself = Sure(0.6)
    itself.level = itself
    assert described(itself, "it")
    with pytest.raises(ValueError, match="state needs a name for it, which holds a object"):
        described(Sure(object()), "it")


def _digest(value):
    from fastlip.attacks._saved import _fingerprint

    return _fingerprint(value)


def test_auto_attack_keeps_its_state(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem
    adversary = autoattack.AutoAttack(
        model, eps=EPS, version="custom", attacks_to_run=["apgd-ce"], verbose=False, seed=0
    )
    adversary.apgd.n_iter = 2
    found = adversary.run_standard_evaluation(inputs, labels, state_path=tmp_path / "state")
    assert torch.equal(adversary.run_standard_evaluation(inputs, labels, state_path=tmp_path / "state"), found)
    with pytest.raises(TypeError, match="x_orig must be a tensor with labels"):
        adversary.run_standard_evaluation([(inputs, labels)], None)
