import contextlib
import sys
from functools import partial

import pytest
import torch
from torch import nn

from fastlip import attacks

EPS = 0.065


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small_suite(**options):
    ball = {"norm": "linf", "eps": EPS} | options
    return {
        "pgd": partial(attacks.pgd, steps=5, loss="ce", **ball),
        "apgd-t": partial(attacks.apgd, steps=10, target_classes=2, **ball),
        "fmn": partial(attacks.min_norm, method="fmn", norm="linf", fmn_steps=10, eps_max=EPS),
        "square": partial(attacks.square, queries=30, **ball),
    }


def test_worst_case_of_each_image(cnn_problem):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[:3] = (labels[:3] + 1) % 10
    found = attacks.evaluate(model, inputs, labels, small_suite(), norm="linf", eps=EPS, batch_size=7)
    decided = model(found.adversarial).argmax(1)
    assert torch.equal(found.clean, torch.arange(32) >= 3)
    assert torch.equal(found.robust, decided == labels)
    assert torch.equal(found.first_success == -2, ~found.clean)
    assert torch.equal(found.first_success == -1, found.robust)
    assert torch.equal(found.success.any(0), found.first_success >= 0)
    assert torch.equal(found.adversarial[found.first_success < 0], inputs[found.first_success < 0])
    assert ((found.adversarial - inputs).abs() <= EPS + 1e-6).all()
    assert found.robust_accuracy < found.clean_accuracy == 29 / 32
    after = [found.accuracy_after(name) for name in found.attacks]
    assert after == sorted(after, reverse=True)
    assert after[-1] == found.robust_accuracy
    assert 0 < found.robust_accuracy, "the comparison needs images that stand"
    assert f"robust accuracy {found.robust_accuracy:.2%}" in str(found)


def test_only_standing_images_go_on(cnn_problem):
    model, inputs, labels = cnn_problem
    seen = []

    def watching(model, x, y):
        seen.append(len(x))
        return x

    first = partial(attacks.pgd, norm="linf", eps=EPS, steps=10, loss="ce")
    found = attacks.evaluate(model, inputs, labels, {"pgd": first, "watching": watching}, batch_size=8)
    assert sum(seen) == int(found.robust.sum()) < 32
    assert len(seen) == -(-sum(seen) // 8), "standing images are packed anew"
    seen.clear()
    attacks.evaluate(model, inputs, labels, {"pgd": first, "watching": watching}, batch_size=8, every_attack=True)
    assert sum(seen) == 32


def test_result_does_not_depend_on_the_batch_size(linear_problem):
    model, inputs, labels = linear_problem(batch=20)
    results = [
        attacks.evaluate(model, inputs, labels, small_suite(eps=0.01), norm="linf", eps=0.065, batch_size=size, seed=4)
        for size in (20, 3)
    ]
    assert torch.equal(results[0].first_success, results[1].first_success)
    assert torch.equal(results[0].adversarial, results[1].adversarial)


def test_counts_passes(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"norm": "linf", "eps": 1e-5, "keep": "last", "steps": 4, "random_start": False}
    found = attacks.evaluate(model, inputs, labels, {"pgd": partial(attacks.pgd, **call)})
    assert found.counts["pgd"] == attacks.PassCounts(forward=4 * 32, backward=4 * 32)
    fast = attacks.evaluate(model, inputs, labels, {"pgd": partial(attacks.pgd, **call)}, fast=True)
    assert fast.counts["pgd"].backward == 4 * 32
    plain = attacks.evaluate(lambda x: model(x), inputs, labels, {"pgd": partial(attacks.pgd, **call)})
    assert plain.counts == {}


def test_what_leaves_ball_or_box_does_not_count(cnn_problem):
    model, inputs, labels = cnn_problem

    def cheat(model, x, y):
        return x.flip(0)

    def escape(model, x, y):
        return 3 * attacks.pgd(model, x, y, eps=0.9)

    for attack, ball in ((cheat, {"norm": "linf", "eps": 0.01}), (escape, {})):
        with pytest.warns(attacks.AttackWarning, match="outside"):
            found = attacks.evaluate(model, inputs, labels, {"cheat": attack}, **ball)
        assert found.robust.all()
    assert not attacks.evaluate(model, inputs, labels, {"cheat": cheat}).robust.all()


def test_warns_where_black_box_beats_white_box(cnn_problem):
    model, inputs, labels = cnn_problem

    class Masked(nn.Module):
        def forward(self, x):
            return model((255 * x).round() / 255 + 0 * x)

    suite = {
        "pgd": partial(attacks.pgd, eps=0.2, steps=3),
        "square": partial(attacks.square, eps=0.2, queries=300),
    }
    with pytest.warns(attacks.AttackWarning) as caught:
        found = attacks.evaluate(Masked(), inputs, labels, suite)
    assert any("black-box attack square" in str(w.message) for w in caught)
    assert any("gradient of exactly zero" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: lambda x: m(x).softmax(1), "probabilities"),
        (lambda m: lambda x: m(x) + 0.1 * torch.randn(len(x), 10), "call to call"),
        (lambda m: lambda x: m(x).detach(), "differentiably"),
        (lambda m: lambda x: m(x) * torch.nan, "not finite"),
        (lambda m: lambda x: 1e4 * m(x), "zero"),
    ],
)
def test_diagnose(cnn_problem, wrap, message):
    model, inputs, labels = cnn_problem
    assert attacks.diagnose(model, inputs, labels) == []
    assert any(message in sentence for sentence in attacks.diagnose(wrap(model), inputs, labels))


def black_and_white() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    inputs = torch.rand(16, 3, 4, 4).round()
    return model, inputs, model(inputs).argmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gray", [0, 20])
def test_diagnoses_a_clamp_of_the_input(dtype, gray):
    model, inputs, labels = black_and_white()
    model, inputs = model.to(dtype), inputs.to(dtype)
    inputs.view(16, -1)[:, :gray] = 0.5
    assert attacks.diagnose(model, inputs, labels) == []
    # In other units too, and with the bounds as tensors.
    lo, hi = torch.full((3, 1, 1), -2.0, dtype=dtype), torch.full((3, 1, 1), 6.0, dtype=dtype)
    for clamp in (nn.functional.hardtanh, torch.clamp):
        edge = torch.zeros(1, requires_grad=True)
        clamp(edge, 0, 1).sum().backward()
        blind = edge.grad.item() == 0  # clamp's gradient at its bounds depends on torch's version
        found = attacks.diagnose(lambda x, clamp=clamp: model(clamp(x, 0, 1)), inputs, labels)
        assert any("clamps its input" in sentence and "remove the clamp" in sentence for sentence in found) == blind
        found = attacks.diagnose(lambda x, clamp=clamp: model(clamp(x, -2, 6)), 8 * inputs - 2, labels, bounds=(lo, hi))
        assert any("clamps its input" in sentence for sentence in found) == blind


def test_evaluate_warns_of_a_clamp_of_the_input():
    model, inputs, labels = black_and_white()
    suite = {"pgd": partial(attacks.pgd, eps=0.3, steps=5, random_start=False)}
    plain = attacks.evaluate(model, inputs, labels, suite)
    assert plain.warnings == ()
    with pytest.warns(attacks.AttackWarning) as caught:
        clamped = attacks.evaluate(nn.Sequential(nn.Hardtanh(0.0, 1.0), model), inputs, labels, suite)
    assert any("clamps its input" in str(w.message) for w in caught)
    assert clamped.robust_accuracy > plain.robust_accuracy


@pytest.mark.parametrize(
    "silent",
    [
        # An all-black image at the kink of every ReLU, one whose ReLUs are dead, saturated logits, pixels that the
        # model does not look at, and no pixel on the bounds.
        lambda m, x: (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), 0 * x),
        lambda m, x: (lambda z: m((z - 2).relu()) + m[1].bias, x),
        lambda m, x: (lambda z: 1e4 * m(z), x),
        lambda m, x: (lambda z: m(z * (torch.arange(4) > 1)), torch.where(torch.arange(4) > 1, 0.5, x)),
        lambda m, x: (lambda z: m(z.clamp(0, 1)), 0.5 + 0 * x),
    ],
)
def test_takes_nothing_else_for_a_clamp(silent):
    model, images, labels = black_and_white()
    model, images = silent(model, images)
    assert not any("clamp" in sentence for sentence in attacks.diagnose(model, images, labels))


def test_leaves_modes_and_random_state(cnn_problem):
    model, inputs, labels = cnn_problem
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    attacks.evaluate(model, inputs, labels, small_suite(), fast=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    assert not model._forward_hooks


def test_progress_is_reported(cnn_problem, capsys):
    model, inputs, labels = cnn_problem
    heard = []
    suite = {"pgd": partial(attacks.pgd, eps=1e-4, steps=1)}
    attacks.evaluate(model, inputs, labels, suite, batch_size=10, progress=lambda *a: heard.append(a))
    assert heard == [(n, 32, "pgd") for n in (0, 10, 20, 30, 32)]
    attacks.evaluate(model, inputs, labels, suite, batch_size=10, progress=True)
    assert "32/32" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["standard", "rand", "quick"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_suites_take_what_evaluate_offers(linear_problem, name, norm):
    model, inputs, labels = linear_problem(batch=2, shape=(3, 6, 6))
    suite = attacks.suite(name, norm=norm, eps={"linf": 5.0, "l2": 30.0, "l1": 300.0}[norm], bounds=(-100.0, 100.0))
    if "square" in suite:
        suite["square"] = partial(suite["square"], queries=5)
    found = attacks.evaluate(model, inputs, labels, suite, bounds=(-100.0, 100.0), every_attack=True)
    gradient = [i for i, attack in enumerate(found.attacks) if attack != "square"]
    assert found.success[gradient].all()


def test_empty_batch(cnn_problem):
    model, inputs, labels = cnn_problem
    found = attacks.evaluate(model, inputs[:0], labels[:0], small_suite(), norm="linf", eps=EPS, fast=True)
    assert found.robust.shape == (0,)
    assert found.success.shape == (4, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attacks": [attacks.pgd]}, TypeError, "mapping"),
        ({"attacks": {"pgd": 3}}, TypeError, "callable"),
        ({"norm": "linf"}, ValueError, "both norm and eps"),
        ({"norm": "l0", "eps": 0.1}, ValueError, "norm must be one of"),
        ({"norm": "linf", "eps": -0.1}, ValueError, "eps must be at least 0"),
        ({"norm": "linf", "eps": torch.ones(32)}, TypeError, "eps must be one float"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"labels": torch.full((32,), 10)}, ValueError, r"labels must lie in \[0, 10\)"),
        ({"labels": torch.full((32,), 10), "check": False}, ValueError, r"labels must lie in \[0, 10\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must be"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "ids must be"),
        ({"inputs": torch.full((32, 3, 12, 12), 7.0)}, ValueError, "inputs must lie"),
        ({"attacks": {"bad": lambda m, x, y: x[:1]}}, ValueError, "must return images"),
        ({"precision": torch.int8}, ValueError, "precision must be"),
    ],
)
def test_errors_name_the_argument(cnn_problem, change, error, message):
    model, inputs, labels = cnn_problem
    call = {"inputs": inputs, "labels": labels, "attacks": small_suite()} | change
    with pytest.raises(error, match=message):
        attacks.evaluate(model, **call)


def test_unknown_suite():
    with pytest.raises(ValueError, match="suite must be"):
        attacks.suite("strong", eps=0.1)


def test_an_evaluation_goes_on_where_it_was_stopped(cnn_problem, tmp_path, monkeypatch):
    model, inputs, labels = cnn_problem
    suite = {
        "pgd": partial(attacks.pgd, eps=0.06, steps=4),
        "apgd": partial(attacks.apgd, eps=0.06, steps=4),
        "square": partial(attacks.square, eps=0.06, queries=5),
    }
    options = {"batch_size": 5, "norm": "linf", "eps": 0.06}
    want = attacks.evaluate(model, inputs, labels, suite, **options)
    monkeypatch.setattr("fastlip.attacks._saved._EVERY", 0.0)
    path = tmp_path / "state"
    seen = []

    class Stopped(Exception):
        pass

    def stop_in_the_second(done, total, name):
        seen.append(name)
        if name == "apgd" and done > 5:
            raise Stopped

    with pytest.raises(Stopped):
        attacks.evaluate(model, inputs, labels, suite, **options, state=path, progress=stop_in_the_second)
    assert "square" not in seen
    seen.clear()
    calls = []
    found = attacks.evaluate(
        model,
        inputs,
        labels,
        suite,
        **options,
        state=path,
        progress=lambda done, total, name: calls.append((name, done)),
    )
    assert calls[0] == ("apgd", 0)
    assert calls[1] == ("apgd", 15)
    for name in ("clean", "robust", "first_success", "success", "adversarial"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert found.counts == want.counts
    assert found.attacks == want.attacks
    again = attacks.evaluate(model, inputs, labels, suite, **options, state=path)
    assert torch.equal(again.success, want.success)
    other = {"pgd": partial(attacks.pgd, eps=0.05)}
    for change in ({"attacks": other}, {"seed": 1}, {"inputs": inputs.flip(0)}, {"draws": 2}):
        given = {"inputs": inputs, "labels": labels, "attacks": suite} | options | change
        with pytest.raises(ValueError, match="state belongs to other images"):
            attacks.evaluate(model, **given, state=path)
    model[-1].bias.data.add_(torch.linspace(-50, 50, 10))
    with pytest.raises(ValueError, match="state belongs to another model"):
        attacks.evaluate(model, inputs, labels, suite, **options, state=path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the state of an evaluation"):
        attacks.evaluate(model, inputs, labels, suite, **options, state=path)


def test_a_loader_and_the_standard_suite(cnn_problem, monkeypatch):
    model, inputs, labels = cnn_problem
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=7)
    suite = {"pgd": partial(attacks.pgd, eps=0.06, steps=4)}
    want = attacks.evaluate(model, inputs, labels, suite)
    for batches in (loader, [(inputs[:5], labels[:5], "names"), [inputs[5:], labels[5:].int()]]):
        found = attacks.evaluate(model, batches, attacks=suite)
        assert torch.equal(found.success, want.success)
    monkeypatch.setattr("fastlip.attacks._evaluate.suite", lambda eps, **_: {"pgd": partial(attacks.pgd, eps=eps)})
    assert attacks.evaluate(model, loader, norm="linf", eps=0.06).attacks == ("pgd",)
    for wrong, message in (
        ((inputs,), "labels must be given"), ((3,), "inputs must be a tensor or batches"), (([],), "no batch"),
        (([inputs],), "inputs must be batches"), ((loader, labels), "inputs must be a floating-point tensor"),
        ((inputs, labels), "attacks must be a mapping"),
    ):  # fmt: skip
        given = {} if "mapping" in message else {"attacks": suite}
        with pytest.raises((TypeError, ValueError), match=message):
            attacks.evaluate(model, *wrong, **given)


def test_a_data_frame(cnn_problem, monkeypatch):
    pytest.importorskip("pandas")
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[0] += 1
    suite = {"weak": partial(attacks.pgd, eps=0.05, steps=1), "strong": partial(attacks.pgd, eps=0.065)}
    found = attacks.evaluate(model, inputs, labels % 10, suite)
    frame = found.to_dataframe()
    assert list(frame.columns) == ["clean", "robust", "first_success", "success: weak", "success: strong"]
    assert frame["robust"].mean() == found.robust_accuracy
    assert frame["first_success"].isna().sum() == int((found.first_success < 0).sum()) > 1
    assert (frame["first_success"] == "strong").sum() == int((found.first_success == 1).sum()) > 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas"):
        found.to_dataframe()


def test_a_state_is_that_of_one_model_and_of_every_value_of_its_options(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem
    suite = {"noise": partial(tensor_noise, size=torch.zeros(2000))}
    options = {"norm": "linf", "eps": 0.06, "state": tmp_path / "state", "check": False}
    attacks.evaluate(model, inputs, labels, suite, **options)
    # A long tensor's repr leaves out what is in its middle.
    other = torch.zeros(2000)
    other[1000] = 1.0
    with pytest.raises(ValueError, match="state belongs to other images, attacks"):
        attacks.evaluate(model, inputs, labels, {"noise": partial(tensor_noise, size=other)}, **options)
    with torch.no_grad():
        model[-1].weight.mul_(1.001)
    with pytest.raises(ValueError, match="state belongs to another model, which has other weights"):
        attacks.evaluate(model, inputs, labels, suite, **options)
    options["state"] = tmp_path / "functions"
    attacks.evaluate(lambda x: model(x), inputs, labels, suite, **options, device="cpu")
    with pytest.raises(ValueError, match="it decides differently"):
        attacks.evaluate(lambda x: -model(x), inputs, labels, suite, **options, device="cpu")


def tensor_noise(model, inputs, labels, size):
    return inputs


def test_a_black_box_attack_of_ours_learns_how_large_a_batch_may_be(cnn_problem):
    """So that few standing images are asked several queries at once; one that makes its own copy gets the model."""
    model, inputs, labels = cnn_problem
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    given, sizes = [], []

    def first(network, x, y, *, fast=False, precision=None):
        given.append(network)
        if not fast:
            return x
        fell = attacks.pgd(model, x, y, eps=1.0, steps=20, step_size=0.2, random_start=False)
        return torch.cat([x[:3], fell[3:]])

    def square(network, x, y, *, fast=False, precision=None):
        hook = model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            return attacks.square(network, x, y, eps=1e-3, queries=150, generator=torch.Generator().manual_seed(0))

    first.black_box = square.black_box = True
    copies = partial(first, fast=True)
    copies.black_box = True
    suite = {"plain": first, "copy": copies, "square": square}
    report = attacks.evaluate(model, inputs, labels, suite, norm="linf", eps=1.0, check=False)
    assert isinstance(given[0], attacks.Network)
    assert given[0].model is model
    assert given[1] is model
    standing = int(report.robust.sum())
    assert 0 < standing < len(inputs) / 4
    assert max(sizes) > 2 * standing
    assert len(sizes) < 120


@pytest.mark.parametrize(
    ("norm", "restarts", "classes", "steps", "fmn_steps"),
    [("linf", 1, 9, 100, 100), ("l2", 1, 9, 100, 100), ("l1", 5, 5, 300, 400)],
)
def test_the_standard_suite_takes_the_steps_that_it_says(norm, restarts, classes, steps, fmn_steps):
    """More of them in "l1": 100 leave images by chance that AutoAttack, or a run of 300, fools."""
    given = {name: attack.keywords for name, attack in attacks.suite("standard", norm=norm, eps=0.5).items()}
    assert given["apgd-ce"]["restarts"] == restarts
    assert (given["apgd-t"]["target_classes"], given["apgd-t"]["steps"]) == (classes, steps)
    assert given["fmn"]["fmn_steps"] == fmn_steps
    assert all(attack["norm"] == norm for attack in given.values())
    assert given["fmn"]["eps_max"] == given["square"]["eps"] == 0.5
