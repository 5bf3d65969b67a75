"""The four questions, their rules, and the verdicts: rules in words are written into config.json before a run."""

import math

import numpy as np

from fastlip.study.config import Rules
from fastlip.study.schema import Model, Statistic, Verdict, VerdictName
from fastlip.study.statistics import Estimate, Rate, over_seeds, spearman

QUESTIONS = (
    "Does the finding of Szegedy et al. hold for a bigger model (trained from scratch)?",
    "Does it hold for the pre-trained model?",
    "Does pre-training raise adversarial robustness?",
    "Do “unstability” (the Lipschitz constant) and average distortion correlate?",
)


def rules_in_words(rules: Rules) -> list[str]:
    """One rule per question, with the run's own numbers in it."""
    share = (
        f"Supported where the lower {rules.confidence:.0%} limit of the share of correctly classified images whose "
        f"smallest adversarial distortion is at most {rules.ratio:g} of their smallest Gaussian distortion exceeds "
        f"{rules.share:g}; contradicted where the upper limit is below {rules.share:g}; with several "
        "seeds, in every one."
    )
    simultaneous = 1 - (1 - rules.confidence) / rules.comparisons
    return [
        share,
        share,
        f"With at least {rules.min_seeds} seeds: supported where the intervals over seeds ({simultaneous:.4%} each, "
        f"{rules.confidence:.0%} together over {rules.comparisons} declared comparisons) of two differences, fine-"
        "tuned minus scratch, the median smallest distortion and the accuracy under PGD at Linf "
        f"{rules.compared_linf_255:g}/255, lie above 0; contradicted where both lie below; undetermined otherwise.",
        f"With at least {rules.min_models} trained models: supported where an interval of Spearman's correlation "
        f"({simultaneous:.4%}, resampling whole models) between median smallest distortion and the Lipschitz constant "
        "excludes 0, certified and observed alike; contradicted where both intervals lie within ±0.2; undetermined "
        "otherwise.",
    ]


def verdicts(models: list[Model], rules: Rules) -> list[Verdict]:
    """The four answers. Reads nothing but ``models`` and ``rules``."""
    words = rules_in_words(rules)
    answers = [
        _share(models, "scratch", rules),
        _share(models, "finetune", rules),
        _pretraining(models, rules),
        _correlation(models, rules),
    ]
    return [
        Verdict(number=i + 1, question=QUESTIONS[i], rule=words[i], verdict=name, because=because, statistics=numbers)
        for i, (name, because, numbers) in enumerate(answers)
    ]


_Answer = tuple[VerdictName, str, list[Statistic]]


def _share(models: list[Model], arm: str, rules: Rules) -> _Answer:
    chosen = [m for m in models if m["arm"] == arm]
    numbers = [
        Statistic(name=f"share of images with ratio ≤ {rules.ratio:g}, {m['name']}", estimate=_of(m["ratio_share"]))
        for m in chosen
    ]
    shares = [m["ratio_share"] for m in chosen]
    if not shares:
        return "undetermined", f"The arm {arm} is not part of this run.", numbers
    if any(s["n"] == 0 for s in shares):
        return "undetermined", "A model classifies none of the attacked images correctly.", numbers
    if all(s["low"] > rules.share for s in shares):
        return "supported", f"The lower limit exceeds {rules.share:g}.", numbers
    if all(s["high"] < rules.share for s in shares):
        return "contradicted", f"The upper limit is below {rules.share:g}.", numbers
    if min(s["low"] for s in shares) <= rules.share <= max(s["high"] for s in shares):
        needed = math.ceil(math.log((1 - rules.confidence) / 2) / math.log(rules.share))
        return (
            "undetermined",
            f"The interval contains {rules.share:g}; even if every image had such a ratio, {needed} "
            "correctly classified images would be needed.",
            numbers,
        )
    return "undetermined", "The seeds disagree.", numbers


def _pretraining(models: list[Model], rules: Rules) -> _Answer:
    confidence = 1 - (1 - rules.confidence) / rules.comparisons
    pairs = [
        (s, f)
        for s in models
        if s["arm"] == "scratch"
        for f in models
        if f["arm"] == "finetune" and f["seed"] == s["seed"]
    ]
    radius = rules.compared_linf_255 / 255
    medians = [(s["smallest_pgd"]["median"]["value"], f["smallest_pgd"]["median"]["value"]) for s, f in pairs]
    distortion = over_seeds(np.array([b - a for a, b in medians if a is not None and b is not None]), confidence)
    accuracy = over_seeds(
        np.array([_accuracy_at(f, radius) - _accuracy_at(s, radius) for s, f in pairs], dtype=float), confidence
    )
    numbers = [
        Statistic(
            name="median smallest distortion (pixels in [0, 1]), fine-tuned − scratch, over seeds", estimate=distortion
        ),
        Statistic(
            name=f"accuracy under PGD at Linf {rules.compared_linf_255:g}/255, fine-tuned − scratch, over seeds",
            estimate=accuracy,
        ),
    ]
    seeds = min(distortion["n"], accuracy["n"])
    if seeds < rules.min_seeds:
        return (
            "undetermined",
            f"This is a claim about training, and its unit is the seed: {seeds} of the {rules.min_seeds} needed were "
            "trained. One pair of models shows how those two differ, not what pre-training does.",
            numbers,
        )
    if all(_above(e, 0) for e in (distortion, accuracy)):
        return "supported", "Both intervals lie above 0.", numbers
    if all(_below(e, 0) for e in (distortion, accuracy)):
        return "contradicted", "Both intervals lie below 0.", numbers
    return "undetermined", "The two intervals do not lie on the same side of 0.", numbers


def _correlation(models: list[Model], rules: Rules) -> _Answer:
    confidence = 1 - (1 - rules.confidence) / rules.comparisons
    usable = [m for m in models if m["smallest_pgd"]["median"]["value"] is not None]
    distortion = np.array([m["smallest_pgd"]["median"]["value"] for m in usable], dtype=float)
    certified = np.array([m["lipschitz"]["log10_upper"] for m in usable], dtype=float)
    observed = np.array([m["smallest_pgd"]["stretch"]["largest"] or 0.0 for m in usable], dtype=float)
    sides = [spearman(side, distortion, confidence, rules.resamples) for side in (certified, observed)]
    numbers = [
        Statistic(
            name="Spearman, certified upper Lipschitz constant and median smallest distortion", estimate=sides[0]
        ),
        Statistic(name="Spearman, largest observed stretch and median smallest distortion", estimate=sides[1]),
    ]
    if len(usable) < rules.min_models:
        return (
            "undetermined",
            f"A correlation is over trained models: {len(usable)} of the {rules.min_models} needed were trained.",
            numbers,
        )
    if all(_above(e, 0) for e in sides) or all(_below(e, 0) for e in sides):
        sign = "positive" if _above(sides[0], 0) else "negative"
        return "supported", f"Both intervals exclude 0; the correlation is {sign}.", numbers
    if all(_above(e, -0.2) and _below(e, 0.2) for e in sides):
        return "contradicted", "Both intervals lie within ±0.2.", numbers
    return "undetermined", "The intervals neither exclude 0 on one side nor lie within ±0.2.", numbers


def _accuracy_at(model: Model, radius: float) -> float:
    for attack in model["attacks"]:
        if attack["norm"] == "linf" and math.isclose(attack["strength"], radius):
            return attack["accuracy"]["value"] or 0.0
    raise ValueError(f"{model['name']} was not attacked at Linf {radius}")


def _of(rate: Rate) -> Estimate:
    return Estimate(n=rate["n"], value=rate["value"], low=rate["low"], high=rate["high"], confidence=rate["confidence"])


def _above(estimate: Estimate, value: float) -> bool:
    return estimate["low"] is not None and estimate["low"] > value


def _below(estimate: Estimate, value: float) -> bool:
    return estimate["high"] is not None and estimate["high"] < value
