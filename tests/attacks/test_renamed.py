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


@pytest.mark.parametrize("options", [{"steps": 3}, {"search_steps": 2}, {"steps": 4, "tolerance": 0.1}])
def test_options_of_the_search_without_a_method_still_search(options):
    model, inputs = nn.Linear(6, 5).requires_grad_(False), torch.rand(4, 6)
    labels = model(inputs).argmax(1)
    with pytest.warns(DeprecationWarning, match=f'give method="search" with {", ".join(options)}$') as caught:
        found = attacks.min_norm(model, inputs, labels, **options)
    assert caught[0].filename == __file__
    want = attacks.min_norm(model, inputs, labels, method="search", **options)
    assert torch.equal(found.adversarial, want.adversarial)
    assert (found.searched > 0).any()  # which only a search says
