"""Comparison of runs, side by side: what differs comes first."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlip._text import printable
from fastlip.study.analysis.statistics import ANY, NOT_NEGATIVE, SHARE, over_seeds
from fastlip.study.errors import StudyError
from fastlip.study.report.arms import arms_of
from fastlip.study.report.number_format import interval
from fastlip.study.report.tables import Table
from fastlip.study.settings.serialization import dotted_names
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Estimate, Model, Proportion, Results

#: What is compared: the number of one model, its scale for readers, and what it can be at all.
_MEASURES: dict[str, tuple[Callable[[Model], Estimate | Proportion], float, tuple[float, float]]] = {
    "clean accuracy, %": (lambda m: m["clean"], 100.0, SHARE),
    "median smallest PGD distortion × 255": (lambda m: m["smallest_pgd"]["median"], 255.0, NOT_NEGATIVE),
    "median smallest Gaussian distortion × 255": (lambda m: m["smallest_gaussian"]["median"], 255.0, NOT_NEGATIVE),
    "median ratio PGD / Gaussian": (lambda m: m["ratio_median"], 1.0, NOT_NEGATIVE),
    "mean accuracy under corruptions, %": (lambda m: m["corruptions"]["mean"], 100.0, SHARE),
    "log10 of the certified Lipschitz constant": (lambda m: _bare(m["lipschitz"]["log10_upper"]), 1.0, ANY),
}


def compare(paths: list[Path]) -> list[Table]:
    """Tables of the runs, their verdicts, the settings that differ and their arms; in each, differences come first.

    Raises:
        StudyError: there are fewer than two runs, or a directory has no results of this version, or damaged ones.
    """
    if len(paths) < 2:
        raise StudyError("name at least two runs: python -m fastlip.study compare RUN RUN", status=2)
    runs = [RunDirectory(path) for path in paths]
    found = [run.read_results() for run in runs]
    for run in runs:
        run.require_intact(run.config_file)
    letters = tuple(_letter(i) for i in range(len(paths)))
    return [
        _runs(letters, paths, found),
        _verdicts(letters, found),
        _settings(letters, runs),
        _arms(letters, found),
    ]


def _letter(i: int) -> str:
    """A, B, ..., Z, AA, AB, ..., which keep columns narrow."""
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _runs(letters: tuple[str, ...], paths: list[Path], found: list[Results]) -> Table:
    rows = tuple(
        (
            letter,
            printable(str(path)),
            printable(r["dataset"]) + (", GENERATED" if r["generated"] else ""),
            ", ".join(arm.name for arm in arms_of(r)),
            str(max(len(arm.models) for arm in arms_of(r))),
        )
        for letter, path, r in zip(letters, paths, found, strict=True)
    )
    note = "RUNS ON GENERATED IMAGES SAY NOTHING ABOUT REAL DATA." if any(r["generated"] for r in found) else ""
    return Table("runs", "Runs", ("", "Run", "Images", "Arms", "Seeds"), rows, note)


def _verdicts(letters: tuple[str, ...], found: list[Results]) -> Table:
    rows = [
        (f"{first['number']}. {printable(first['question'])}", *(r["verdicts"][i]["verdict"] for r in found))
        for i, first in enumerate(found[0]["verdicts"])
    ]
    rows = [(*row, "yes" if len(set(row[1:])) > 1 else "no") for row in rows]
    header = ("Question", *letters, "Differ")
    return Table("verdicts", "Verdicts", header, _differing_first(rows), "A verdict speaks about its own run.")


def _settings(letters: tuple[str, ...], runs: list[RunDirectory]) -> Table:
    values: list[dict[str, Any]] = [dotted_names(run.settings) for run in runs]
    for v, run in zip(values, runs, strict=True):
        v |= {f"input {name}": what for name, what in run.config["inputs"].items()}
    names = dict.fromkeys(name for v in values for name in v)
    texts = {name: [_setting(v.get(name, "–")) for v in values] for name in names}
    rows = tuple((name, *text) for name, text in texts.items() if len(set(text)) > 1)
    return Table("settings", "Settings that differ", ("Setting", *letters), rows, f"{len(rows)} differ.")


def _setting(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return printable(text) or "(empty)"


def _arms(letters: tuple[str, ...], found: list[Results]) -> Table:
    arms = [{arm.key: arm for arm in arms_of(r)} for r in found]
    rows = []
    for key, name in dict.fromkeys((a.key, a.name) for run in arms for a in run.values()):
        for measure, (of, scale, possible) in _MEASURES.items():
            numbers = [_over_runs(run[key].models, of, possible) if key in run else None for run in arms]
            cells = ["not in it" if e is None else interval(e, scale) for e in numbers]
            rows.append((name, measure, *cells, _apart([e for e in numbers if e is not None])))
    note = (
        "Of one model, its interval over images; of several, the mean over n seeds with Student's t interval. They "
        "differ where two intervals have nothing in common, and cannot be told apart otherwise."
    )
    return Table("arms", "Arms", ("Arm", "Measure", *letters, "Differ"), _differing_first(rows), note, keys=2)


def _over_runs(
    models: Sequence[Model], of: Callable[[Model], Estimate | Proportion], possible: tuple[float, float]
) -> Estimate:
    estimates = [of(m) for m in models]
    if len(models) == 1:
        e = estimates[0]
        return Estimate(n=e["n"], value=e["value"], low=e["low"], high=e["high"], confidence=e["confidence"])
    found = [e["value"] for e in estimates if e["value"] is not None]
    complete = np.array(found if len(found) == len(models) else [], dtype=float)
    return over_seeds(complete, models[0]["clean"]["confidence"], possible)


def _bare(value: float) -> Estimate:
    """A number that has no interval."""
    return Estimate(n=1, value=value, low=None, high=None, confidence=0.0)


def _apart(estimates: list[Estimate]) -> str:
    """Whether any two intervals have nothing in common; a dash where there are no two."""
    limits = [(e["low"], e["high"]) for e in estimates if e["value"] is not None]
    known = [(low, high) for low, high in limits if low is not None and high is not None]
    if len(known) < 2:
        return "–"
    return "yes" if max(low for low, _ in known) > min(high for _, high in known) else "no"


def _differing_first(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    return tuple(sorted(rows, key=lambda row: row[-1] != "yes"))
