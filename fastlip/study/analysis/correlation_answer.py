"""Question 4: whether "unstability" and distortion correlate."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastlip.study.analysis import decisions
from fastlip.study.analysis.answers import Answer, bounded, counted, listed
from fastlip.study.analysis.power import chance_to_find
from fastlip.study.analysis.statistics import correlation_limits, partial_spearman, spearman
from fastlip.study.settings.rules import Rules
from fastlip.study.storage.schema import Point, Statistic

#: The two cases that the verdict is about.
CASES = ("scratch", "finetune")

#: The arm whose runs are trained to have different constants; it is stated and decides nothing.
_BOUNDED = "constrained"

_SIDES: dict[Literal["log10_constant", "log10_stretch"], str] = {
    "log10_constant": "certified constant over median margin",
    "log10_stretch": "largest observed stretch over median margin",
}


@dataclass(frozen=True)
class _Arm:
    """The points of an arm that are correlated: complete runs at the moments that they share, [runs, moments]."""

    runs: int
    moments: int
    instability: dict[str, np.ndarray]
    distortion: np.ndarray
    controls: np.ndarray  # [2, runs, moments]: epoch, clean accuracy
    reliability: float  # NaN where it does not exist


def answer(points: list[Point], large: set[str], rules: Rules) -> Answer:
    """The answer; ``large`` are the arms of the large network."""
    arms = {arm: _arm([p for p in points if p["arm"] == arm], rules) for arm in sorted(large)}
    found = {arm: _correlated(a, rules) for arm, a in arms.items()}
    tested = [s for arm, a in arms.items() for s in _statistics(arm, a, found[arm], rules)]
    given = _answer(arms, found, tested, rules)
    if _BOUNDED in arms and arms[_BOUNDED].runs >= rules.min_runs:
        given = replace(given, because=f"{given.because} {_beside(found[_BOUNDED][0], arms[_BOUNDED].runs)}")
    return given


def _answer(
    arms: dict[str, _Arm],
    found: dict[str, tuple[np.ndarray, np.ndarray]],
    tested: list[Statistic],
    rules: Rules,
) -> Answer:
    missing = [case for case in CASES if case not in arms]
    if missing:
        because = f"The run has no arm {listed(missing)}."
        headline = f"Not asked: {because[0].lower()}{because[1:]}"
        return Answer("undetermined", headline, because, f"Train the arm {listed(missing)}.", tested)
    cases = [arms[case] for case in CASES]
    runs, reliability = min(a.runs for a in cases), float(np.min([a.reliability for a in cases]))  # NaN if either is
    rho, p = (np.concatenate([found[case][i] for case in CASES]) for i in (0, 1))
    chance = chance_to_find(runs, reliability, rules)
    seen = _seen(rho, runs)
    if chance < rules.least_power:
        known = "unknown reliability" if math.isnan(reliability) else f"reliability {reliability:.2f}"
        because = (
            f"With {counted(runs, 'run')} of an arm and distortions of {known}, this rule would find a correlation of "
            f"{rules.correlation:g} with a probability of {chance:.2f}; {rules.least_power:g} is needed."
        )
        if runs < rules.min_runs:
            because = (
                f"An arm has {counted(runs, 'run')} where the rule needs {rules.min_runs}: snapshots of a run are no "
                "runs, and their partial correlations are stated without a verdict."
            )
        headline = f"These runs cannot say whether unstable networks are easier to fool: {seen}."
        change = "More seeds, and more attacked images where the reliability is low; the power note says how many."
        return Answer("undetermined", headline, because, change, tested)
    verdict = int(decisions.correlations(rho, p, runs, reliability, rules))
    level = f"{1 - rules.confidence:.2g}"
    further = "Further runs that disagree with these would."
    if verdict == 1:
        more = "less" if rho[0] < 0 else "more"
        headline = f"Networks with larger Lipschitz constants for their margins withstand {more}: {seen}."
        sign = "negative" if rho[0] < 0 else "positive"
        return Answer(
            "supported", headline, f"All four correlations differ from 0 at {level}, and are {sign}.", further, tested
        )
    limit = rules.correlation * math.sqrt(reliability)
    if verdict == -1:
        headline = f"A network's Lipschitz constant hardly tells how easily it is fooled: {seen}."
        because = (
            f"All four intervals lie within ±{limit:.2f}, which a true correlation of {rules.correlation:g} comes to "
            f"with distortions of reliability {reliability:.2f}."
        )
        return Answer("contradicted", headline, because, further, tested)
    headline = f"Whether unstable networks are easier to fool stays open: {seen}."
    because = f"The four correlations neither differ from 0 at {level} with one sign nor lie within ±{limit:.2f}."
    return Answer("undetermined", headline, because, "More runs would narrow the intervals.", tested)


def _beside(rho: np.ndarray, runs: int) -> str:
    """What the arm whose constants differ by training shows, which the verdict does not count."""
    known = [f"{value:+.2f} ({side})" for value, side in zip(rho, _SIDES.values(), strict=True) if not np.isnan(value)]
    seen = f"has the rank correlations {listed(known)}" if known else "has no rank correlation"
    return f"Beside the verdict, the arm with bounded norms {seen} over {counted(runs, 'run')}."


def _seen(rho: np.ndarray, runs: int) -> str:
    known = rho[~np.isnan(rho)]
    if not len(known):
        return f"no rank correlation exists over {counted(runs, 'run')} of each arm"
    extremes = f"from {known.min():+.2f} to {known.max():+.2f}"
    return f"rank correlations {extremes} over {counted(runs, 'run')} of each arm"


def _arm(points: list[Point], rules: Rules) -> _Arm:
    """The final models of an arm where there are enough of them, and all its points otherwise."""
    finals = [p for p in points if p["epoch"] is None]
    chosen = finals if len(finals) >= rules.min_runs else points
    moments = sorted({math.inf if p["epoch"] is None else p["epoch"] for p in chosen})
    by_run: dict[str, dict[float, Point]] = {}
    for p in chosen:
        by_run.setdefault(p["run"], {})[math.inf if p["epoch"] is None else p["epoch"]] = p
    rows = [[of_run[m] for m in moments] for of_run in by_run.values() if len(of_run) == len(moments)]
    shape = (len(rows), len(moments))

    def table(values: list[float | None]) -> np.ndarray:
        return np.array([math.nan if v is None else v for v in values]).reshape(shape)

    flat = [p for row in rows for p in row]
    # Reliabilities differ between the moments; the lowest is what the question has to live with.
    reliabilities = [math.nan if p["reliability"] is None else p["reliability"] for p in flat]
    return _Arm(
        runs=len(rows),
        moments=len(moments),
        instability={name: table([p[name] for p in flat]) for name in _SIDES},
        distortion=table([p["log10_distortion"] for p in flat]),
        controls=np.array(
            [np.broadcast_to(np.arange(len(moments)), shape), table([p["accuracy"]["value"] for p in flat])]
        ),
        reliability=float(np.min(reliabilities)) if reliabilities else math.nan,
    )


def _correlated(arm: _Arm, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """The correlations of both sides with distortion, [2], NaN where they do not exist, and their p-values."""
    found = []
    for side in arm.instability.values():
        if arm.runs < 2 or np.isnan([side, arm.distortion]).any():
            found.append((math.nan, 1.0))
        elif arm.runs >= rules.min_runs:
            rho, p = spearman(side[:, 0], arm.distortion[:, 0])
            found.append((float(rho), float(p)))
        else:
            found.append(partial_spearman(side, arm.distortion, arm.controls, rules.resamples))
    rho, p = np.array(found).T
    return rho, p


def _statistics(arm: str, a: _Arm, found: tuple[np.ndarray, np.ndarray], rules: Rules) -> list[Statistic]:
    how = "" if a.runs >= rules.min_runs else ", partial on epoch and accuracy"
    rows = []
    for side, rho, p in zip(_SIDES.values(), *found, strict=True):
        low, high = (float(v) if a.runs > 3 else math.nan for v in correlation_limits(rho, a.runs, rules.confidence))
        name = (
            f"{arm}: rank correlation of {side} and smallest distortion{how} ({counted(a.runs * a.moments, 'point')})"
        )
        row = bounded(name, a.runs, rho, low, high, rules.confidence)
        rows.append(Statistic(name=name, estimate=row["estimate"], p=None if np.isnan(rho) else float(p)))
    name = f"{arm}: split-half reliability of the mean log distortion"
    rows.append(bounded(name, a.runs, a.reliability, math.nan, math.nan, rules.confidence))
    return rows
