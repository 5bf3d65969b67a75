"""Figures as files and as parts of a page."""

import csv
import io
import re

from fastlip.study.report import drawing, robustness_figures, training_figures
from fastlip.study.storage.files import read_json


def many_seeds(results, seeds=3):
    """The same models under several seeds."""
    models = [m | {"seed": s, "name": f"{m['arm']}-s{s}"} for s in range(seeds) for m in results["models"]]
    return results | {"models": models}


def test_the_legend_names_each_arm_once_however_many_seeds_there_are(finished):
    found = training_figures.training_figure(many_seeds(read_json(finished.results)))
    assert found.svg.count("scratch, 3 seeds") == found.svg.count("fine-tuned, 3 seeds") == 1
    rows = list(csv.DictReader(io.StringIO(found.csv)))
    assert {row["model"] for row in rows} == {f"{arm}-s{s}" for arm in ("scratch", "finetune") for s in range(3)}


def test_on_a_page_every_colour_is_one_that_dark_mode_swaps(finished):
    results = read_json(finished.results)
    html = finished.report.read_text()
    for figure in [*robustness_figures.accuracy_figures(results), robustness_figures.corruption_figure(results)]:
        svg = drawing.inline(figure)
        assert not re.findall(r"(?:fill|stroke): #", svg)
        names = set(re.findall(r"var\(--(\w+)\)", svg))
        assert {"ink", "muted", "grid", "scratch", "finetune"} <= names
        for name in names:
            assert html.count(f"--{name}: #") == 2  # once for light and once for dark
