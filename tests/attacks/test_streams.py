"""Evaluations of images that come in batches: memory, resuming, and what a state is refused for."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastlip import attacks

SUITE = {
    "pgd": partial(attacks.pgd, eps=0.06, steps=2),
    "apgd": partial(attacks.apgd, eps=0.06, steps=3),
    "square": partial(attacks.square, eps=0.06, queries=3),
}
BALL = {"norm": "linf", "eps": 0.06}
OF_IMAGES = ("clean", "robust", "first_success", "success")


class Stopped(Exception):
    pass


def loader(inputs, labels, batch_size=3, **options):
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, **options)


def same(found, want):
    assert found.attacks == want.attacks
    assert found.counts == want.counts
    for name in OF_IMAGES:
        assert torch.equal(getattr(found, name), getattr(want, name)), name


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr("fastlip.attacks._saved._EVERY", 0.0)


def test_a_stream_gives_the_result_of_its_images(cnn_problem):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[::9] += 1
    labels %= 10
    want = attacks.evaluate(model, inputs, labels, SUITE, **BALL, batch_size=3)
    assert 0 < want.robust.sum() < want.clean.sum() < 32
    collected = []

    def collect(rows, images):
        collected.append((rows, images))

    found = attacks.evaluate(
        model, loader(inputs, labels, 5), attacks=SUITE, **BALL, batch_size=2, collect=collect, check=False
    )
    for name in OF_IMAGES:
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert found.adversarial is None
    assert len(collected) > 2
    assert torch.equal(torch.cat([rows for rows, _ in collected]), torch.arange(32))
    torch.testing.assert_close(torch.cat([images for _, images in collected]), want.adversarial, rtol=0, atol=1e-6)
    attacks.evaluate(model, inputs, labels, SUITE, **BALL, batch_size=3, collect=lambda *it: collected.append(it))
    assert torch.equal(collected[-1][1], want.adversarial)


def test_memory_does_not_grow_with_the_number_of_images(cnn_problem):
    """At no time is more alive of what a source gave than a few batches."""
    model, inputs, labels = cnn_problem
    alive, most = [], []

    def batches():
        for k in range(40):
            batch = inputs[k % 8 * 4 : k % 8 * 4 + 4].clone()
            alive.append(weakref.ref(batch))
            most.append(sum(ref() is not None for ref in alive))
            yield batch, labels[k % 8 * 4 : k % 8 * 4 + 4]
            del batch

    held = []

    class Watching(nn.Module):
        def forward(self, x):
            held.append(sum(ref() is not None for ref in alive))
            return model(x)

    found = attacks.evaluate(Watching(), batches(), attacks={"pgd": SUITE["pgd"]}, **BALL, batch_size=4)
    assert len(found.clean) == 160
    assert max(most) <= 6
    assert max(held) <= 6


def test_a_source_of_unknown_length(cnn_problem, capsys):
    model, inputs, labels = cnn_problem

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(zip(inputs, labels, strict=True))

    want = attacks.evaluate(model, inputs, labels, SUITE, **BALL, batch_size=3)
    heard = []
    for batches in (DataLoader(Endless(), batch_size=5), ((x[None], y[None]) for x, y in Endless())):
        heard.clear()
        found = attacks.evaluate(
            model, batches, attacks=SUITE, **BALL, batch_size=3, progress=lambda *it: heard.append(it)
        )
        for name in OF_IMAGES:
            assert torch.equal(getattr(found, name), getattr(want, name)), name
        assert {total for _, total, _ in heard} == {-1}
        for name in SUITE:
            done = [n for n, _, attack in heard if attack == name]
            assert done == sorted(done)
            assert done[-1] == 32
    attacks.evaluate(model, DataLoader(Endless(), batch_size=5), attacks=SUITE, **BALL, batch_size=3, progress=True)
    assert "square: 32image" in capsys.readouterr().err


def test_a_bar_counts_all_images_of_a_loader(cnn_problem, capsys):
    model, inputs, labels = cnn_problem
    heard = []
    options = {"attacks": SUITE, **BALL, "batch_size": 2}
    attacks.evaluate(model, loader(inputs, labels), **options, progress=lambda *it: heard.append(it))
    assert {total for _, total, _ in heard} == {32}
    attacks.evaluate(model, loader(inputs, labels), **options, progress=True)
    assert capsys.readouterr().err.count("32/32") >= 3


@pytest.mark.parametrize("after", [("apgd", 14), ("square", 32)])
def test_it_goes_on_with_a_loader_made_again(cnn_problem, tmp_path, no_wait, after):
    model, inputs, labels = cnn_problem
    options = {"attacks": SUITE, **BALL, "batch_size": 2, "state": tmp_path / "state"}
    want = attacks.evaluate(model, loader(inputs, labels), **options | {"state": None})

    def stop(done, total, name):
        if name == after[0] and done >= after[1]:
            raise Stopped

    with pytest.raises(Stopped):
        attacks.evaluate(model, loader(inputs, labels), **options, progress=stop)
    passes = []
    with attacks.count_forward_backward(model) as counts:
        attacks.evaluate(model, loader(inputs, labels), **options | {"state": None})
        passes.append(counts.backward)
    with attacks.count_forward_backward(model) as counts:
        found = attacks.evaluate(model, loader(inputs, labels), **options)
        passes.append(counts.backward)
    same(found, want)
    assert found.warnings == want.warnings
    assert passes[1] < passes[0]
    with attacks.count_forward_backward(model) as counts:
        same(attacks.evaluate(model, loader(inputs, labels), **options), want)
    assert counts.backward == 0, "all is known"
    more = torch.cat([inputs, inputs[:6]]), torch.cat([labels, labels[:6]])
    with pytest.raises(ValueError, match="batch 10 differs"):  # the last one was not full
        attacks.evaluate(model, loader(*more), **options)


def test_it_goes_on_with_images_that_were_added(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem
    options = {"attacks": SUITE, **BALL, "batch_size": 2, "state": tmp_path / "state"}
    attacks.evaluate(model, loader(inputs[:20], labels[:20], 4), **options)
    found = attacks.evaluate(model, loader(inputs, labels, 4), **options)
    want = attacks.evaluate(model, loader(inputs, labels, 4), **options | {"state": None})
    for name in OF_IMAGES:
        assert torch.equal(getattr(found, name), getattr(want, name)), name


def test_other_images_are_refused(cnn_problem, tmp_path, no_wait):
    model, inputs, labels = cnn_problem
    options = {"attacks": SUITE, **BALL, "batch_size": 2, "state": tmp_path / "state"}

    def stop(done, total, name):
        if done >= 20:
            raise Stopped

    with pytest.raises(Stopped):
        attacks.evaluate(model, loader(inputs, labels), **options, progress=stop)
    other, named = inputs.clone(), labels.clone()
    other[4, 0, 0, 0] += 1e-3
    named[4] += 1
    for changed, batch in (
        (loader(other, labels), 1), (loader(inputs, named), 1), (loader(inputs, labels, 4), 0),
        (loader(inputs.flip(0), labels.flip(0)), 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"state belongs to other images: batch {batch} differs"):
            attacks.evaluate(model, changed, **options)
    with pytest.raises(ValueError, match="state belongs to other images: there were"):
        attacks.evaluate(model, loader(inputs[:6], labels[:6]), **options)
    with pytest.raises(ValueError, match="state belongs to other images"):
        attacks.evaluate(model, inputs, labels, **options)


def test_a_loader_that_shuffles_has_no_state(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem
    options = {"attacks": {"pgd": SUITE["pgd"]}, **BALL}
    shuffling = loader(inputs, labels, shuffle=True)
    with pytest.raises(ValueError, match=r"^state needs a loader that does not shuffle.*RandomSampler$"):
        attacks.evaluate(model, shuffling, **options, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    want = attacks.evaluate(model, loader(inputs, labels), **options)
    assert abs(attacks.evaluate(model, shuffling, **options).robust_accuracy - want.robust_accuracy) < 0.1
    sampler = torch.utils.data.DistributedSampler(TensorDataset(inputs, labels), 1, 0, shuffle=True)
    with pytest.raises(ValueError, match="DistributedSampler"):
        attacks.evaluate(model, loader(inputs, labels, sampler=sampler), **options, state=tmp_path / "state")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda x, y: [(x, y[:3])], r"labels must be of shape \[32\]"),
        (lambda x, y: [(x, y.float())], "labels must be a tensor of integers"),
        (lambda x, y: [(x[:4], y[:4]), (9 * x, y)], "inputs must lie within bounds"),
        (lambda x, y: iter([]), "inputs hold no batch"),
    ],
)
def test_batches_are_checked_as_they_come(cnn_problem, batches, message):
    model, inputs, labels = cnn_problem
    with pytest.raises((TypeError, ValueError), match=message):
        attacks.evaluate(model, batches(inputs, labels), attacks=SUITE, batch_size=1)


def test_ids_and_bounds_of_batches(cnn_problem):
    model, inputs, labels = cnn_problem
    ids = torch.arange(100, 132)
    want = attacks.evaluate(model, inputs, labels, SUITE, **BALL, ids=ids, batch_size=3)
    found = attacks.evaluate(model, loader(inputs, labels), attacks=SUITE, **BALL, ids=ids, batch_size=2)
    assert torch.equal(found.success, want.success)
    for wrong in (ids[:31], torch.arange(40)):
        with pytest.raises(ValueError, match=r"ids must be of shape \[32\]"):
            attacks.evaluate(model, loader(inputs, labels), attacks=SUITE, ids=wrong)
    box = (inputs - 0.02).clamp(0, 1), (inputs + 0.02).clamp(0, 1)
    own = {"pgd": partial(attacks.pgd, eps=0.06, bounds=box)}
    for given in ({"attacks": SUITE, "bounds": box}, {"attacks": own}):
        with pytest.raises(ValueError, match="bounds must be the same for all images where these come in batches"):
            attacks.evaluate(model, loader(inputs, labels), **given)
    channels = torch.zeros(3, 1, 1), torch.ones(1, 3, 1, 1)
    found = attacks.evaluate(model, loader(inputs, labels), attacks=SUITE, **BALL, bounds=channels, batch_size=2)
    want = attacks.evaluate(model, inputs, labels, SUITE, **BALL, batch_size=2)
    assert torch.equal(found.success, want.success)


def test_attacks_that_are_left_out_of_a_stream(cnn_problem):
    """All images of the first part are misclassified, so that only the second one shows what the attack needs."""
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[:16] = (labels[:16] + 1) % 10
    suite = {"pgd": SUITE["pgd"], "square": partial(attacks.square, eps=0.2, queries=30)}
    with pytest.warns(attacks.AttackWarning) as caught:
        found = attacks.evaluate(lambda x: model(x).detach(), loader(inputs, labels, 4), attacks=suite, batch_size=4)
    assert any("pgd was left out" in str(w.message) for w in caught)
    assert found.attacks == ("square",)
    assert found.success.shape == (1, 32)
    assert (found.first_success[found.success[0]] == 0).all()
    assert found.success.any()


def test_warnings_are_those_of_all_images(cnn_problem):
    model, inputs, labels = cnn_problem

    def escape(model, x, y):
        return 3 * attacks.pgd(model, x, y, eps=0.9)

    with pytest.warns(attacks.AttackWarning) as caught:
        found = attacks.evaluate(model, loader(inputs, labels, 4), attacks={"escape": escape}, batch_size=1)
    assert [str(w.message) for w in caught] == list(found.warnings)
    assert len(found.warnings) == 1
    count = int(found.warnings[0].split()[0])
    assert 16 < count <= 32
