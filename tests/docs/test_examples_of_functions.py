"""The `Example` of each public function and class, as its docstring has it."""

import importlib
import inspect
import re
import textwrap

import pytest
import torch

import fastlip

NAMES = ("attacks", "data", "lipschitz", "metrics", "models", "norms", "ops", "study")
MODULES = [
    fastlip, *(getattr(fastlip, name) for name in NAMES)
]  # fmt: skip
ADAPTERS = ["torchattacks", "foolbox", "art", "autoattack", "attackbench", "robustbench"]
#: Classes that only functions make, and protocols of functions: their makers have the examples.
MADE = {
    "AttackWarning", "Iteration", "PassCounts", "MinNormResult", "NormInterval",
    "BallBounds", "Domain", "FunctionCall", "Interval", "Part", "APGDState", "Backend", "Judgement",
    "ModelInput", "OperatorPlan", "CensoredMedian", "Rate", "Anatomy", "SpectralPenalty",
}  # fmt: skip
EXAMPLE = re.compile(r"^Example:\n\n?((?: {4}.*\n?|\n)+)", re.MULTILINE)


def public():
    """The public functions and classes, by qualified name, each once."""
    found = {}
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing not in found.values():
                found[f"{module.__name__}.{name}"] = thing
    return found


PUBLIC = public()


def examples(thing):
    return [textwrap.dedent(block) for block in EXAMPLE.findall(inspect.getdoc(thing) or "")]


def code(block):
    """The code of an example, without prompts and what is printed."""
    lines = [line[4:] for line in block.splitlines() if line.startswith((">>> ", "... ")) or line in (">>>", "...")]
    return "\n".join(lines)


def test_all_that_is_public_is_looked_at():
    assert len(PUBLIC) > 100
    assert {name.rpartition(".")[2] for name in PUBLIC} >= MADE


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.rpartition(".")[2] not in MADE])
def test_an_example_runs(name, tmp_path, monkeypatch):
    blocks = examples(PUBLIC[name])
    assert blocks, f"{name} has no Example"
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            text = code(block)
            assert name.rpartition(".")[2] in text, f"{name}: its example does not use it"
            exec(compile(text, f"<example of {name}>", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_classes_of_an_adapter_are_on_its_page(adapter):
    """Those examples run in tests/integrations, on one model."""
    page = (importlib.resources.files(fastlip) / "integrations" / "README.md").read_text()
    assert f"fastlip.integrations.{adapter} import" in page or f"from fastlip.integrations import {adapter}" in page
