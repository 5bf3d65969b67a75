"""AutoAttack's interface, AttackBench's signature and RobustBench's JSON."""

import ast
import importlib.util
import json
import typing
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from fastlip import attacks
from fastlip.integrations._require import require
from fastlip.integrations.attackbench import as_attackbench
from fastlip.integrations.autoattack import AutoAttack
from fastlip.integrations.robustbench import model_info, write_model_info

EPS = {"Linf": 0.065, "L2": 1.0, "L1": 8.0}


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_no_weaker_than_auto_attack(trained, norm):
    peer = pytest.importorskip("pyautoattack")
    model, inputs, labels = trained
    adversary = AutoAttack(
        model, norm=norm, eps=EPS[norm], version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"], verbose=False, seed=0
    )
    state = torch.get_rng_state()
    found, decided = adversary.run_standard_evaluation(inputs, labels, bs=16, return_labels=True)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(decided, model(found).argmax(1))
    assert adversary.evaluation.robust_accuracy == (decided == labels).double().mean()
    with torch.random.fork_rng(devices=[]):
        theirs = peer.AutoAttack(model, norm=norm, eps=EPS[norm], version="custom", seed=0,
                                 attacks=["apgd-ce", "apgd-dlr"])  # fmt: skip
        want, _ = theirs.run_standard_evaluation(inputs, labels, batch_size=16)
    standing = [(model(x).argmax(1) == labels).sum() for x in (found, want)]
    assert standing[0] <= standing[1] + 1
    assert 0 < standing[0] < 32


def test_individual_and_verbose(trained, capsys):
    model, inputs, labels = trained
    adversary = AutoAttack(model, eps=0.02, version="custom", attacks_to_run=["fab", "square"], seed=0)
    adversary.attacks["square"] = partial(adversary.attacks["square"], queries=20)
    found = adversary.run_standard_evaluation_individual(inputs, labels)
    assert list(found) == ["fab", "square"]
    assert "robust accuracy" in capsys.readouterr().out
    assert adversary.clean_accuracy(inputs, labels, bs=10) == 1
    assert list(AutoAttack(model).attacks) == ["apgd-ce", "apgd-t", "fmn", "square"]
    assert list(AutoAttack(model, version="rand").attacks) == ["apgd-ce", "apgd-dlr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L0"}, "norm must be"),
        ({"attacks_to_run": ["square"]}, "version='custom'"),
        ({"version": "custom", "attacks_to_run": ["pgd"]}, "names out of"),
        ({"version": "plus"}, "version must be"),
        ({"eps": -1.0}, "eps must be"),
    ],
)
def test_errors_of_auto_attack(trained, options, message):
    with pytest.raises(ValueError, match=message):
        AutoAttack(trained[0], **options)


def small(model, **options):
    adversary = AutoAttack(model, eps=0.065, verbose=False, seed=0, **options)
    adversary.apgd.n_iter, adversary.apgd_targeted.n_iter = 3, 3
    return adversary


def test_settings_of_auto_attack_may_be_changed(trained):
    model, inputs, labels = trained
    adversary = small(model)
    assert adversary.attacks_to_run == ["apgd-ce", "apgd-t", "fmn", "square"]
    adversary.attacks_to_run = ["apgd-ce", "fab"]
    adversary.fab.n_iter = 5
    adversary.run_standard_evaluation(inputs, labels)
    assert adversary.evaluation.attacks == ("apgd-ce", "fab")
    assert adversary.attacks["apgd-ce"].keywords["steps"] == 3
    before = adversary.evaluation.robust_accuracy
    adversary.epsilon = 1e-6
    adversary.run_standard_evaluation(inputs, labels)
    assert adversary.evaluation.robust_accuracy == 1 > before
    adversary.norm, adversary.epsilon = "L2", 1.0
    found = adversary.run_standard_evaluation(inputs, labels)
    assert 0.5 < (found - inputs).flatten(1).norm(dim=1).max() <= 1.0 + 1e-5
    adversary.attacks = {"mine": partial(attacks.pgd, norm="l2", eps=1.0, steps=2)}
    adversary.run_standard_evaluation(inputs, labels)
    assert adversary.evaluation.attacks == ("mine",)
    for wrong in (lambda: setattr(adversary, "eps_", 1), lambda: setattr(adversary.apgd, "restarts", 1)):
        with pytest.raises(AttributeError, match="no setting"):
            wrong()
    adversary.attacks_to_run = []
    with pytest.raises(ValueError, match="attacks_to_run must name attacks"):
        adversary.run_standard_evaluation(inputs, labels)


def test_settings_that_were_not_changed_are_the_suite_s(trained):
    adversary = AutoAttack(trained[0], norm="L1", eps=8.0)
    assert (adversary.apgd.n_restarts, adversary.apgd.n_iter, adversary.apgd.eot_iter) == (5, 100, 1)
    assert adversary.apgd_targeted.n_target_classes == 5
    assert adversary.square.n_queries == 5000
    rand = AutoAttack(trained[0], version="rand", eps=0.03)
    assert (rand.apgd.n_restarts, rand.apgd.eot_iter) == (1, 20)
    rand.set_version("standard")
    assert list(rand.attacks) == ["apgd-ce", "apgd-t", "fmn", "square"]
    assert rand.apgd.eot_iter == 1


def test_a_function_a_log_and_a_state(trained, tmp_path):
    model, inputs, labels = trained
    calls = []

    def forward_pass(x):
        calls.append(len(x))
        return model(x)

    adversary = small(forward_pass, version="custom", log_path=tmp_path / "log.txt")
    adversary.attacks_to_run = ["apgd-ce", "apgd-t"]
    assert adversary.clean_accuracy(inputs, labels, bs=10) == 1
    found, decided = adversary.run_standard_evaluation(
        inputs, labels, return_labels=True, state_path=tmp_path / "state"
    )
    assert torch.equal(decided, model(found).argmax(1))
    assert "after apgd-t" in (tmp_path / "log.txt").read_text()
    calls.clear()
    again = adversary.run_standard_evaluation(inputs, labels, state_path=tmp_path / "state")
    assert torch.equal(again, found)
    assert len(calls) == 1, "the images themselves are judged again, and nothing else"
    individual = adversary.run_standard_evaluation_individual(inputs, labels, return_labels=True)
    assert set(individual) == {"apgd-ce", "apgd-t"}


def test_auto_attack_takes_a_criterion(trained):
    model, inputs, labels = trained

    def out_of_the_first_two(logits, classes):
        return (logits.topk(2).indices != classes[:, None]).all(1)

    adversary = small(model, version="custom", attacks_to_run=["apgd-ce", "fmn"], criterion=out_of_the_first_two)
    adversary.fab.n_iter, adversary.epsilon = 5, 0.1
    found = adversary.run_standard_evaluation(inputs, labels)
    with torch.no_grad():
        fell = out_of_the_first_two(model(found), labels)
    assert torch.equal(~fell, adversary.evaluation.robust)
    assert 0 < fell.sum() < len(labels)
    other = (labels + 1) % 10
    assert adversary.clean_accuracy(inputs, other, bs=10) == (
        (~out_of_the_first_two(model(inputs), other)).double().mean().item()
    )
    adversary.criterion = None
    assert adversary.clean_accuracy(inputs, other, bs=10) == (model(inputs).argmax(1) == other).double().mean().item()
    adversary.run_standard_evaluation(inputs, labels)
    assert (~adversary.evaluation.robust).sum() > fell.sum()  # for which a wrong decision alone does
    with pytest.raises(TypeError, match="criterion must be a function"):
        small(model, criterion=3).run_standard_evaluation(inputs, labels)


def test_auto_attack_s_own_names_are_said(trained):
    model, inputs, labels = trained
    adversary = AutoAttack(model, eps=0.02, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    for call, message in (
        ({"x_orig": 3 * inputs, "y_orig": labels}, "x_orig must lie"),
        ({"x_orig": inputs, "y_orig": labels.float()}, "y_orig must be"),
        ({"x_orig": inputs, "y_orig": labels, "bs": 0}, "bs must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            adversary.run_standard_evaluation(**call)


@pytest.mark.parametrize("threat_model", ["linf", "l2", "l1"])
def test_runs_under_attackbench(trained, threat_model):
    attackbench = pytest.importorskip("attackbench")
    model, inputs, labels = trained
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=16)
    attack = as_attackbench(attacks.min_norm, method="fmn", fmn_steps=20)
    results = attackbench.run_attack(
        model=model, dataset=loader, attack=attack, threat_model=threat_model, device=torch.device("cpu")
    )
    assert not any(results["batch_failures"])
    assert not any(results["box_failures"])
    distances = torch.tensor(results["distances"][threat_model])
    assert torch.isfinite(distances).float().mean() > 0.9


def test_attackbench_signature(trained):
    model, inputs, labels = trained
    found = as_attackbench(attacks.pgd, eps=0.2)(model, inputs, labels)
    assert (model(found).argmax(1) != labels).all()
    targets = (labels + 1) % 10
    found = as_attackbench(attacks.apgd, eps=0.3)(model, inputs, labels, targets=targets, targeted=True)
    assert (model(found).argmax(1) == targets).float().mean() > 0.8
    usual = as_attackbench(attacks.pgd, steps=1)(model, inputs, labels)
    assert (usual - inputs).abs().max() <= 8 / 255 + 1e-6
    less = as_attackbench(attacks.pgd, steps=1, eps=0.2)(model, inputs, labels, epsilon=1 / 255)
    assert (less - inputs).abs().max() <= 1 / 255 + 1e-6
    near = as_attackbench(attacks.min_norm, method="fmn", fmn_steps=5)(model, inputs, labels, epsilon=1 / 255)
    assert (near - inputs).abs().max() <= 1 / 255 + 1e-6
    with pytest.raises(ValueError, match="threat_model"):
        as_attackbench(attacks.pgd)(model, inputs, labels, threat_model="l0")
    with pytest.raises(TypeError, match="norm and bounds"):
        as_attackbench(lambda model, x, y: x)


def test_attackbench_keeps_its_own_images(trained):
    model, inputs, labels = trained
    before = inputs.clone(), labels.clone()

    def attack(model, x, y, *, norm, bounds=(0.0, 1.0)):
        y.add_(1)
        return x.fill_(0.5)

    assert (as_attackbench(attack)(model, inputs, labels) == 0.5).all()
    assert torch.equal(inputs, before[0])
    assert torch.equal(labels, before[1])


def test_robustbench_json(trained, tmp_path):
    model, inputs, labels = trained
    suite = {"pgd": partial(attacks.pgd, eps=0.065, steps=3)}
    found = attacks.evaluate(model, inputs, labels, suite, norm="linf", eps=0.065)
    path = write_model_info(tmp_path, "Ours2026", "linf", found, dataset="cifar10", eps=0.065, architecture="CNN")
    assert path == tmp_path / "cifar10" / "Linf" / "Ours2026.json"
    info = json.loads(path.read_text())
    assert float(info["autoattack_acc"]) == pytest.approx(100 * found.robust_accuracy, abs=0.005)
    assert info["clean_acc"] == "100.00"
    assert info == model_info(found, dataset="cifar10", eps=0.065, architecture="CNN", name="Ours2026")
    with pytest.raises(ValueError, match="norm must be"):
        write_model_info(tmp_path, "x", "l0", found, dataset="cifar10", eps=1.0)


def test_keys_are_robustbench_s(trained):
    """The fields of RobustBench's own record, read from its source: its import needs more than it installs."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("robustbench is not installed")
    source = ast.parse((Path(spec.submodule_search_locations[0]) / "utils.py").read_text())
    record = next(n for n in source.body if isinstance(n, ast.ClassDef) and n.name == "ModelInfo")
    fields = {n.target.id for n in record.body if isinstance(n, ast.AnnAssign)}
    model, inputs, labels = trained
    found = attacks.evaluate(model, inputs, labels, {})
    assert set(model_info(found, dataset="cifar10", eps=0.1)) <= fields


def robustbench_s(folder):
    """RobustBench's readers as they are installed, without the import of its model zoo, which needs more packages."""
    enums = {}
    exec(compile((folder / "model_zoo" / "enums.py").read_text(), "enums.py", "exec"), enums)
    scope = {"json": json, "Path": Path, "Union": typing.Union, "Optional": typing.Optional, "warnings": warnings}
    scope |= {name: enums[name] for name in ("BenchmarkDataset", "ThreatModel")}
    wanted = {"ACC_FIELDS", "list_available_models", "get_key", "get_leaderboard_latex"}
    for node in ast.parse((folder / "utils.py").read_text()).body:
        named = {node.name} if hasattr(node, "name") else {t.id for t in getattr(node, "targets", [])}
        if named & wanted:
            exec(compile(ast.Module([node], []), "utils.py", "exec"), scope)
    return scope


@pytest.mark.parametrize("given", [{}, {"architecture": "ResNet-18", "venue": "ICML 2026", "link": "https://x.org"}])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robustbench_reads_the_json(trained, tmp_path, monkeypatch, capsys, given, norm):
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("robustbench is not installed")
    readers = robustbench_s(Path(spec.submodule_search_locations[0]))
    model, inputs, labels = trained
    ball = {"norm": norm, "eps": {"linf": 0.065, "l2": 1.0}[norm]}
    suite = {"pgd": partial(attacks.pgd, steps=3, **ball)}
    found = attacks.evaluate(model, [(inputs, labels)], attacks=suite, **ball)
    write_model_info(tmp_path / "model_info", "Ours2026", norm, found, dataset="cifar10", eps=ball["eps"], **given)
    monkeypatch.chdir(tmp_path)
    threat = readers["ThreatModel"]({"linf": "Linf", "l2": "L2"}[norm])
    readers["all_models"] = {readers["BenchmarkDataset"]("cifar10"): {threat: {"Ours2026": None}}}
    readers["list_available_models"]("cifar10", threat)
    row = capsys.readouterr().out.splitlines()[-1]
    assert "**Ours2026**" in row
    assert f"{found.robust_accuracy:.2%}" in row
    assert given.get("venue", "Unpublished") in row
    latex = readers["get_leaderboard_latex"]("cifar10", threat)
    assert f"{100 * found.robust_accuracy:.2f}" in latex
    assert given.get("architecture", "").replace("ResNet", "RN") in latex


def test_a_missing_package_is_named():
    with pytest.raises(ImportError, match="pip install no-such-package"):
        require("no_such_module", "no-such-package")
