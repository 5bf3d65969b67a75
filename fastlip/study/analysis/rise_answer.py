"""Question 3: whether pre-training raises adversarial robustness."""

import math

import numpy as np

from fastlip.study.analysis import decisions
from fastlip.study.analysis.answers import ARMS_IN_WORDS, Answer, counted, differences, listed, points
from fastlip.study.analysis.statistics import over_seeds, over_seeds_p
from fastlip.study.settings.rules import Rules
from fastlip.study.storage.schema import Comparison, Model, Statistic

_MEASURES = ("log smallest distortion", "relative accuracy under PGD")


def answer(models: list[Model], comparisons: list[Comparison], one_source: bool, rules: Rules) -> Answer:
    """The answer; ``one_source`` says that all seeds were fine-tuned from one source."""
    arms = {m["arm"] for m in models}
    missing = [arm for arm in ("scratch", "finetune") if arm not in arms]
    if missing:
        because = f"The run has no arm {listed(missing)}."
        return Answer("undetermined", f"Not asked: {_small(because)}", because, f"Train the arm {listed(missing)}.")
    baselines = ["scratch", *(["matched"] if "matched" in arms else [])]
    values = np.array([[_by_seed(comparisons, b, measure) for measure in _MEASURES] for b in baselines])  # [B, 2, S]
    tested = [
        _tested(values[i, j], measure, baseline, rules)
        for i, baseline in enumerate(baselines)
        for j, measure in enumerate(_MEASURES)
    ]
    seeds = values.shape[-1]
    headline = _headline(values, baselines, seeds, rules)
    compute = "" if "matched" in arms else " Compute was not matched: the source's training is on top of fine-tuning's."
    source = " All seeds share one source, so this is about that source." if one_source else ""
    scope = source + compute
    if seeds < rules.min_seeds:
        because = (
            f"This is a claim about training, and its unit is the seed: {seeds} of the {rules.min_seeds} needed were "
            "trained. One pair of models shows how those two differ, not what pre-training does."
        )
        return Answer("undetermined", headline, because + scope, f"Train {rules.min_seeds} seeds or more.", tested)
    lost = int(np.isnan(values).any((0, 1)).sum())
    if lost:
        because = f"In {lost} of {seeds} seeds a difference does not exist: no image is classified correctly by both."
        return Answer("undetermined", headline, because + scope, "Models that classify more images.", tested)
    found = int(decisions.rises(values, rules))
    level = f"{1 - rules.confidence:.2g}"
    smallest = (
        f"a factor of {rules.distortion_margin:g} in distortion and {rules.accuracy_margin:g} in relative accuracy"
    )
    if found == 1:
        because = f"Each difference is above 0 at {level}, against {listed([ARMS_IN_WORDS[b] for b in baselines])}."
        change = "Further seeds that disagree with these would."
    elif found == -1:
        because = f"Against {ARMS_IN_WORDS[baselines[-1]]} both differences are below {smallest}: not higher."
        change = "Further seeds that disagree with these would."
    else:
        because = f"The differences are neither all above 0 at {level} nor shown to be below {smallest}."
        change = "More seeds; the power note says how many."
    return Answer(decisions.NAMES[found], headline, because + scope, change, tested)


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _by_seed(comparisons: list[Comparison], against: str, measure: str) -> list[float]:
    rows = differences(comparisons, "finetune", against, measure)
    values = [c["difference"]["value"] for c in rows]
    return [math.nan if v is None else v for v in values]


def _tested(values: np.ndarray, measure: str, baseline: str, rules: Rules) -> Statistic:
    # A seed without a difference is not left out: that would select among the seeds.
    complete = not np.isnan(values).any() and len(values) >= rules.min_seeds
    name = f"{measure}, fine-tuned minus {ARMS_IN_WORDS[baseline].removeprefix('training ')}, mean over seeds"
    if measure == "relative accuracy under PGD":
        name = name.replace("PGD", f"PGD at Linf {rules.compared_linf_255:g}/255")
    return Statistic(
        name=name, estimate=over_seeds(values, rules.confidence), p=over_seeds_p(values) if complete else None
    )


def _headline(values: np.ndarray, baselines: list[str], seeds: int, rules: Rules) -> str:
    said = []
    for (distortion, accuracy), baseline in zip(values, baselines, strict=True):
        if np.isnan(distortion).any() or np.isnan(accuracy).any() or seeds == 0:
            continue
        said.append(
            f"{math.exp(distortion.mean()):.2f} times as much perturbation to fool as after {ARMS_IN_WORDS[baseline]}, "
            f"and keeps {points(float(accuracy.mean()), 'more', 'less')} of its accuracy under attack"
        )
    if not said:
        return "The fine-tuned network cannot be compared with one from scratch."
    return f"The fine-tuned network takes {'; '.join(said)} ({counted(seeds, 'seed')})."
