"""Results as pages, figures, rows in a notebook and JSON."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import fastlip
from fastlip import attacks
from fastlip.attacks import EvaluationResult


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x + torch.relu(self.inner(x)))


@pytest.fixture(scope="module")
def results():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual().eval()
        images = torch.rand(5, 6)
    report = fastlip.layer_norms(model, (6,))
    ball = fastlip.lipschitz_bound(model, (6,), bounds=(0, 1), around=images[0], radius=0.25)
    labels = model(images).argmax(1)
    suite = {"<pgd>": partial(attacks.pgd, eps=0.2), "square": partial(attacks.square, eps=0.3, queries=20)}
    return report, ball, attacks.evaluate(model, images, labels, suite)


def test_json_brings_back_the_same(results):
    report, bound, evaluation = results
    assert type(report).from_json(report.to_json()) == report
    left_out = replace(report, left_out={"a.weight": "reason"})
    assert type(report).from_json(left_out.to_json()) == left_out
    again = type(bound).from_json(bound.to_json())
    assert again.parts == bound.parts
    assert again.to_dict() == bound.to_dict()
    for name in ("lower", "upper", "centre"):
        assert torch.equal(getattr(again.domain, name), getattr(bound.domain, name)), name
    assert (again.domain.reach, again.domain.radius) == (bound.domain.reach, bound.domain.radius)
    back = EvaluationResult.from_json(evaluation.to_json())
    assert str(back) == str(evaluation)
    for name in ("clean", "robust", "first_success", "success"):
        assert torch.equal(getattr(back, name), getattr(evaluation, name)), name
    assert back.adversarial is None


def test_a_bound_everywhere_comes_back(results):
    bound = fastlip.lipschitz_bound(nn.Sequential(nn.Linear(3, 2)).eval(), (3,))
    again = type(bound).from_json(bound.to_json())
    assert str(again) == str(bound)
    assert not again.domain.restricted


def test_other_json_is_refused(results):
    for result in results:
        name = type(result).__name__
        for text in ("{}", "[1]", "no JSON", json.dumps({"layers": 3})):
            with pytest.raises(ValueError, match=f"this is not the JSON of a {name}: "):
                type(result).from_json(text)


def test_pages_and_notebooks_show_the_numbers(results):
    pytest.importorskip("jinja2")
    report, bound, evaluation = results
    for result, shown in (
        (report, ["inner", f"{report['inner'].upper:.5g}", "Product of 2 layers"]),
        (bound, [f"{bound.upper:.4g}", "inner", "within an L2 distance of 0.25"]),
        (evaluation, ["&lt;pgd&gt;", f"{100 * evaluation.robust_accuracy:.2f}%", "of 5 images"]),
    ):
        page, fragment = result.to_html("A <title>"), result._repr_html_()
        assert "<h1>A &lt;title&gt;</h1>" in page
        assert page.startswith("<!doctype html>")
        assert "<html" not in fragment
        assert "http" not in page
        assert "<pgd>" not in page
        for words in shown:
            assert words in page, words
            assert words in fragment, words


def test_without_jinja_notebooks_fall_back_to_the_text(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for result in results:
        assert result._repr_html_() is None
        with pytest.raises(ImportError, match="HTML reports need Jinja2"):
            result.to_html()


def test_results_are_drawn(results, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    report, bound, evaluation = results
    drawn = [result.plot() for result in results]
    names = [
        [label.get_text() for label in (a.get_yticklabels(), a.get_yticklabels(), a.get_xticklabels())[i]]
        for i, a in enumerate(drawn)
    ]
    assert names[0] == list(report)
    assert len(names[1]) == len(bound.parts)
    assert names[2] == ["clean", "after <pgd>", "after square"]
    heights = [bar.get_height() for bar in drawn[2].patches]
    assert heights == [evaluation.clean_accuracy, *map(evaluation.accuracy_after, evaluation.attacks)]
    assert report.plot(drawn[0]) is drawn[0]
    pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="figures need matplotlib"):
        report.plot()
