"""The four questions and the verdicts on them, by the rules of :mod:`fastlip.study.settings.rules`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastlip.study.analysis.statistics import holm, over_seeds, over_seeds_p, proportion, spearman
from fastlip.study.settings.rules import Rules, rules_in_words
from fastlip.study.settings.training import TRANSFER
from fastlip.study.storage.schema import Comparison, Estimate, Model, Point, Proportion, Statistic, Verdict, VerdictName

QUESTIONS = (
    "Does the finding of Szegedy et al. hold for a bigger model (trained from scratch)?",
    "Does it hold for the pre-trained model?",
    "Does pre-training raise adversarial robustness?",
    "Do “unstability” (the Lipschitz constant) and average distortion correlate, in both cases?",
)

CASES = {"from scratch": ("scratch",), "pre-trained": TRANSFER}


def verdicts(models: list[Model], comparisons: list[Comparison], points: list[Point], rules: Rules) -> list[Verdict]:
    """The four verdicts, which depend on the arguments alone."""
    declared = [*_differences(comparisons, rules), *_correlations(points, rules)]
    adjusted, levels = holm([c.p for c in declared], 1 - rules.confidence)
    tested = [_tested(c, a, level) for c, a, level in zip(declared, adjusted, levels, strict=True)]
    answers = [
        _share(models, "scratch", rules),
        _share(models, "finetune", rules),
        _pretraining(tested[:2], rules),
        _correlation(tested[2:], points, rules),
    ]
    words = rules_in_words(rules)
    return [
        Verdict(
            number=i + 1,
            question=QUESTIONS[i],
            rule=words[i],
            verdict=answer.verdict,
            because=answer.because,
            change=answer.change,
            statistics=answer.statistics,
        )
        for i, answer in enumerate(answers)
    ]


@dataclass(frozen=True)
class _Answer:
    verdict: VerdictName
    because: str
    change: str
    statistics: list[Statistic]


@dataclass(frozen=True)
class _Declared:
    """A declared comparison: its p-value, and its estimate at a given confidence."""

    name: str
    p: float | None
    estimate: Callable[[float], Estimate]


def _tested(comparison: _Declared, adjusted: float, level: float) -> Statistic:
    estimate = comparison.estimate(1 - level)
    p_holm = None if comparison.p is None else adjusted
    return Statistic(name=comparison.name, estimate=estimate, p=comparison.p, p_holm=p_holm)


def _share(models: list[Model], arm: str, rules: Rules) -> _Answer:
    def stated(names: tuple[str, ...]) -> list[Statistic]:
        return [
            Statistic(
                name=f"share of images with ratio ≤ {rules.ratio:g}, {m['name']}",
                estimate=_of(m["ratio_share"]),
                p=None,
                p_holm=None,
            )
            for m in models
            if m["arm"] in names
        ]

    # The small network is listed as what "bigger" is relative to; the rule does not use it.
    numbers = stated((arm, "reference") if arm == "scratch" else (arm,))
    shares = [m["ratio_share"] for m in models if m["arm"] == arm]
    if not shares:
        return _Answer("undetermined", f"The arm {arm} is not part of this run.", f"Train the arm {arm}.", numbers)
    if any(s["n"] == 0 for s in shares):
        because = "A model classifies none of the attacked images correctly."
        return _Answer("undetermined", because, "Train longer.", numbers)
    if all(s["low"] > rules.share for s in shares):
        spare = min(_spare(s, rules) for s in shares)
        change = (
            f"It would be undetermined with {spare} more image{'s' if spare > 1 else ''} above the ratio in the model "
            "nearest to the limit."
        )
        return _Answer("supported", f"The lower limit exceeds {rules.share:g}.", change, numbers)
    if all(s["high"] < rules.share for s in shares):
        because = f"The upper limit is below {rules.share:g}."
        return _Answer("contradicted", because, f"Shares near {rules.share:g} would make it undetermined.", numbers)
    if any(s["low"] <= rules.share <= s["high"] for s in shares):
        needed = math.ceil(math.log((1 - rules.confidence) / 2) / math.log(rules.share))
        because = (
            f"{'An' if len(shares) > 1 else 'The'} interval contains {rules.share:g}; even if every image had such a "
            f"ratio, {needed} correctly classified images would be needed."
        )
        return _Answer("undetermined", because, "More attacked images would narrow the interval.", numbers)
    because = f"The seeds disagree: some lie above {rules.share:g} and some below."
    return _Answer("undetermined", because, "Seeds that agree would settle it.", numbers)


def _spare(share: Proportion, rules: Rules) -> int:
    """The number of further images above the ratio that would bring the lower limit down to the rule's proportion."""
    n, k = share["n"], share["k"]
    lost = 1
    while k - lost > 0 and proportion(np.arange(n) < k - lost, rules.confidence)["low"] > rules.share:
        lost += 1
    return lost


def _differences(comparisons: list[Comparison], rules: Rules) -> list[_Declared]:
    """The two declared comparisons of question 3, over the differences of the seeds."""
    named = {
        "median smallest distortion": "median smallest distortion (pixels in [0, 1])",
        "accuracy under PGD": f"accuracy under PGD at Linf {rules.compared_linf_255:g}/255",
    }
    found = []
    for measure, name in named.items():
        seeds = [c["difference"]["value"] for c in comparisons if c["arm"] == "finetune" and c["measure"] == measure]
        values = np.array([v for v in seeds if v is not None], dtype=float)
        # A seed has no difference where few perturbations were found: leaving it out would select among the seeds.
        complete = len(values) == len(seeds) >= rules.min_seeds
        found.append(
            _Declared(
                f"{name}, fine-tuned − scratch on the same images, over seeds",
                over_seeds_p(values) if complete else None,
                lambda confidence, values=values: over_seeds(values, confidence),  # type: ignore[misc]
            )
        )
    return found


def _pretraining(tested: list[Statistic], rules: Rules) -> _Answer:
    counts = [s["estimate"]["n"] for s in tested]
    seeds = max(counts)
    if seeds >= rules.min_seeds and min(counts) < seeds:
        because = f"In {seeds - min(counts)} of {seeds} seeds the difference of the medians does not exist (censored)."
        return _Answer("undetermined", because, "A search that finds more of the smallest perturbations.", tested)
    if seeds < rules.min_seeds:
        because = (
            f"This is a claim about training, and its unit is the seed: {seeds} of the {rules.min_seeds} needed were "
            "trained. One pair of models shows how those two differ, not what pre-training does."
        )
        return _Answer("undetermined", because, f"Train {rules.min_seeds} seeds or more.", tested)
    signs = [_sign(s, rules) for s in tested]
    if signs == [1, 1]:
        return _Answer("supported", "Both differences are above 0 after correction.", _MORE_SEEDS, tested)
    if signs == [-1, -1]:
        return _Answer("contradicted", "Both differences are below 0 after correction.", _MORE_SEEDS, tested)
    if 0 in signs:
        because = "Not both differences can be told from 0 after correction."
        return _Answer("undetermined", because, "More seeds; the power note says how many.", tested)
    return _Answer("undetermined", "The two measures contradict each other.", _MORE_SEEDS, tested)


_MORE_SEEDS = "Further seeds that disagree with these would."


def _correlations(points: list[Point], rules: Rules) -> list[_Declared]:
    """The four declared comparisons of question 4."""
    found = []
    for case, arms in CASES.items():
        chosen = [p for p in points if p["arm"] in arms and p["median"] is not None and p["stretch"] is not None]
        distortion = np.array([p["median"] for p in chosen], dtype=float)
        sides = {
            "certified upper Lipschitz constant": np.array([p["log10_upper"] for p in chosen], dtype=float),
            "largest observed stretch": np.array([p["stretch"] for p in chosen], dtype=float),
        }
        for name, side in sides.items():
            runs = [p["run"] for p in chosen]
            correlation = spearman(side, distortion, runs, rules.resamples)
            p = correlation.p if correlation.runs >= rules.min_runs else None
            label = f"Spearman, {name} and median smallest distortion, {case} ({len(chosen)} points)"
            found.append(_Declared(label, p, correlation.estimate))
    return found


def _correlation(tested: list[Statistic], points: list[Point], rules: Rules) -> _Answer:
    runs = {case: len({p["run"] for p in points if p["arm"] in arms}) for case, arms in CASES.items()}
    few = [f"{count} {case}" for case, count in runs.items() if count < rules.min_runs]
    if few:
        because = (
            f"Snapshots of one training run are not independent, and the unit is the run: {' and '.join(few)}, where "
            f"{rules.min_runs} are needed."
        )
        return _Answer("undetermined", because, "More seeds, or more transfer methods.", tested)
    signs = {_sign(s, rules) for s in tested}
    if signs == {1} or signs == {-1}:
        sign = "positive" if signs == {1} else "negative"
        because = f"All four correlations differ from 0 after correction, and are {sign}."
        return _Answer("supported", because, "Further runs that disagree with these would.", tested)
    if all(_within(s["estimate"], rules.no_correlation) for s in tested):
        because = f"All four intervals lie within ±{rules.no_correlation:g}."
        return _Answer("contradicted", because, "Further runs that disagree with these would.", tested)
    because = f"The four correlations neither differ from 0 with one sign nor lie within ±{rules.no_correlation:g}."
    return _Answer("undetermined", because, "More runs would narrow the intervals.", tested)


def _sign(statistic: Statistic, rules: Rules) -> int:
    """The sign of a statistic that differs from 0 after correction; 0 for one that does not."""
    value, p = statistic["estimate"]["value"], statistic["p_holm"]
    if value is None or p is None or p > 1 - rules.confidence:
        return 0
    return int(np.sign(value))


def _within(estimate: Estimate, limit: float) -> bool:
    low, high = estimate["low"], estimate["high"]
    return low is not None and high is not None and low > -limit and high < limit


def _of(share: Proportion) -> Estimate:
    return Estimate(
        n=share["n"], value=share["value"], low=share["low"], high=share["high"], confidence=share["confidence"]
    )
