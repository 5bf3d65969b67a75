"""The bar of an evaluation: tqdm's, on standard error, and one line in its place where tqdm is missing."""

import runpy
import sys
from functools import partial

import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.attacks import _progress


@pytest.fixture
def evaluate():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), torch.rand(7, 6)
    fgsm = partial(attacks.fgsm, eps=0.01)
    return partial(attacks.evaluate, model, inputs, model(inputs).argmax(1), {"first": fgsm, "second": fgsm})


def test_a_line_for_each_attack_goes_to_standard_error(evaluate, capsys):
    found = evaluate(batch_size=3, every_attack=True, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line.split("\r")[-1] for line in shown.err.rstrip("\n").split("\n")]
    assert [line.split(":")[0] for line in lines] == ["first", "second"]
    assert all("7/7" in line for line in lines)
    assert found.attacks == ("first", "second")


def test_an_attack_without_images_has_a_line_too(capsys):
    _progress.progress_of(True)(0, 0, "none")
    assert "none" in capsys.readouterr().err


def test_without_tqdm_one_line_says_what_to_install_and_nothing_else_changes(evaluate, capsys, monkeypatch):
    want = evaluate(batch_size=3)
    for module in ("tqdm", "tqdm.auto"):  # the second may have been imported by other tests
        monkeypatch.setitem(sys.modules, module, None)
    found = evaluate(batch_size=3, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == 'fastlip: no progress is shown without tqdm: pip install "fastlip[progress]"\n'
    assert torch.equal(found.adversarial, want.adversarial)
    evaluate(batch_size=3)
    evaluate(batch_size=3, progress=lambda done, total, name: None)
    assert capsys.readouterr().err == "", "only who asks for the bar is told"


def test_tqdm_is_not_imported_before_a_bar_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert runpy.run_path(_progress.__file__)["progress_of"](False)(0, 1, "any") is None
