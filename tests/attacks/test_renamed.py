"""Former public names still work, and say which name has taken their place."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlip
from fastlip import attacks


@pytest.mark.parametrize(
    ("old", "new"),
    [("Evaluation", "EvaluationResult"), ("Passes", "PassCounts"), ("count_passes", "count_forward_backward")],
)
def test_former_names_of_the_module(old, new):
    with pytest.warns(DeprecationWarning, match=rf"fastlip\.attacks\.{old} is now {new}") as caught:
        found = getattr(attacks, old)
    assert found is getattr(attacks, new)
    assert caught[0].filename == __file__
    assert old not in attacks.__all__


def test_former_names_of_a_result():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    inputs = torch.rand(4, 6)
    found = attacks.evaluate(
        model, inputs, model(inputs).argmax(1), {"fgsm": lambda m, x, y: attacks.fgsm(m, x, y, eps=0.1)}
    )
    for old, new in (("passes", "counts"), ("fell_to", "first_success")):
        with pytest.warns(DeprecationWarning, match=rf"EvaluationResult\.{old} is now {new}") as caught:
            assert getattr(found, old) is getattr(found, new)
        assert caught[0].filename == __file__


def test_a_name_that_never_was_is_refused():
    with pytest.raises(AttributeError, match=r"'fastlip\.attacks' has no attribute 'fgms'"):
        attacks.fgms  # noqa: B018


def former_names_in(source):
    """Former names that ``source`` imports from fastlip.attacks, or reads from ``attacks``."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "attacks"}
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "fastlip.attacks"]
    return (used | {alias.name for n in imports for alias in n.names}) & set(attacks._RENAMED)


def test_fastlip_itself_uses_the_new_names():
    assert former_names_in("from fastlip.attacks import Passes, pgd") == {"Passes"}
    assert former_names_in("from fastlip import attacks\nattacks.count_passes(model)") == {"count_passes"}
    for path in Path(fastlip.__file__).parent.rglob("*.py"):
        assert not former_names_in(path.read_text()), path
