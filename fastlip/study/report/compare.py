"""Comparison of runs, side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlip.study.errors import StudyError
from fastlip.study.report.number_format import distortion, interval, number, percent, power
from fastlip.study.report.tables import Table
from fastlip.study.settings.serialization import dotted_names
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Model, Results

_MEASURES: dict[str, Callable[[Model], str]] = {
    "Clean accuracy": lambda m: percent(m["clean"]),
    "Median smallest PGD distortion × 255": lambda m: distortion(m["smallest_pgd"]["median"]),
    "Median smallest Gaussian distortion × 255": lambda m: distortion(m["smallest_gaussian"]["median"]),
    "Median ratio PGD / Gaussian": lambda m: interval(m["ratio_median"]),
    "Certified upper Lipschitz constant": lambda m: power(m["lipschitz"]["log10_upper"]),
    "Largest observed stretch": lambda m: number(m["largest_stretch"]),
    "Mean accuracy under corruptions, per cent": lambda m: interval(m["corruptions"]["mean"], 100.0),
}


def compare(paths: list[Path]) -> list[Table]:
    """Tables of the verdicts, the models and the differing settings of two or more runs.

    Raises:
        StudyError: there are fewer than two runs, or a directory has no results of this version, or damaged ones.
    """
    if len(paths) < 2:
        raise StudyError("name at least two runs: python -m fastlip.study compare RUN RUN", status=2)
    runs = [RunDirectory(path) for path in paths]
    found = [run.read_results() for run in runs]
    for run in runs:
        run.require_intact(run.config_file)
    heads = tuple(str(path) for path in paths)
    return [_verdicts(heads, found), _models(heads, found), _settings(heads, runs)]


def _verdicts(heads: tuple[str, ...], found: list[Results]) -> Table:
    rows = [
        (f"{first['number']}. {first['question']}", *(r["verdicts"][i]["verdict"] for r in found))
        for i, first in enumerate(found[0]["verdicts"])
    ]
    images = ", ".join(f"{h}: {r['dataset']}" for h, r in zip(heads, found, strict=True))
    note = f"Images of {images}. A verdict speaks about its own run."
    if any(r["generated"] for r in found):
        note += " RUNS ON GENERATED IMAGES SAY NOTHING ABOUT REAL DATA."
    return Table("verdicts", "Verdicts", ("Question", *heads), tuple(rows), note)


def _models(heads: tuple[str, ...], found: list[Results]) -> Table:
    by_name: list[dict[str, Model]] = [{m["name"]: m for m in r["models"]} for r in found]
    every = dict.fromkeys(name for models in by_name for name in models)
    rows = [
        (name, measure, *(text(models[name]) if name in models else "not trained" for models in by_name))
        for name in every
        for measure, text in _MEASURES.items()
    ]
    note = "Brackets: intervals of each run's own confidence. Models of one name have each run's own settings."
    return Table("models", "Models", ("Model", "Measure", *heads), tuple(rows), note)


def _settings(heads: tuple[str, ...], runs: list[RunDirectory]) -> Table:
    values: list[dict[str, Any]] = [dotted_names(run.settings) for run in runs]
    values = [v | {"source and target": str(run.config["inputs"])} for v, run in zip(values, runs, strict=True)]
    rows = [(name, *(str(v[name]) for v in values)) for name in values[0] if len({str(v[name]) for v in values}) > 1]
    return Table("settings", "Settings that differ", ("Setting", *heads), tuple(rows), f"{len(rows)} differ.")
