"""Questions 1 and 2: how small adversarial perturbations are, beside noise and beside small networks."""

import math

import numpy as np

from fastlip.study.analysis import decisions
from fastlip.study.analysis.answers import (
    ARMS_IN_WORDS,
    Answer,
    bounded,
    counted,
    differences,
    fraction,
    listed,
    points,
    stated,
    who,
)
from fastlip.study.analysis.statistics import over_seeds
from fastlip.study.settings.rules import Rules
from fastlip.study.storage.schema import Comparison, Model, Statistic, Transfer


def answer(
    arm: str, models: list[Model], comparisons: list[Comparison], transfer: list[Transfer], rules: Rules
) -> Answer:
    """The answer for the large network of one arm."""
    large = [m for m in models if m["arm"] == arm]
    references = list(dict.fromkeys(m["arm"] for m in models if m["role"] == "reference"))
    if not large:
        because = f"The arm {arm} is not part of this run."
        return Answer("undetermined", f"Not asked: {because[0].lower()}{because[1:]}", because, f"Train the arm {arm}.")
    of_arm = {name: [m for m in models if m["arm"] == name] for name in (arm, *references)}
    headline = _headline(of_arm)
    numbers = [s for same in of_arm.values() for s in _medians(same, rules)]
    flat = large[0]["flat_boundary"]
    drawn = counted(flat["directions"], "direction")
    name = f"ratio of a flat boundary in {flat['dimensions']:,} dimensions with {drawn} (predicted)"
    numbers.append(stated(name, 0, flat["ratio"], rules.confidence))
    beside = _transfers(large, transfer, rules)
    if "softmax" not in references:
        missing = [name for name in ("softmax", "mlp", "convnet", "resnet18") if name not in references]
        because = (
            "Whether perturbations are small for a deep network can only be said beside small ones, softmax regression "
            "among them, on the same images: a flat boundary alone makes them small."
        )
        return Answer("undetermined", headline, because, f"Add the arms {listed(missing)}.", numbers + beside)
    tested = [_ratio(arm, reference, comparisons, rules) for reference in references]
    gain = _gain(arm, comparisons, rules)
    found = _decide(tested, gain, rules)
    spoken = _spoken(references, tested, gain, found, rules)
    seeds = len(large)
    if seeds < rules.min_seeds:
        model = "this model" if seeds == 1 else f"these {seeds} models"
        scope = f" This is about {model} and holds over images; {rules.min_seeds} seeds would say more about training."
    else:
        scope = f" This holds over images and over {seeds} seeds, each by itself."
    because, change = spoken
    if not _deep(gain, rules):
        headline += " It is not shown to be more than a linear model."
    return Answer(decisions.NAMES[found], headline, because + scope, change, [*tested, gain, *numbers, *beside])


def _headline(of_arm: dict[str, list[Model]]) -> str:
    (large, *references) = of_arm.values()
    said = [(who(large), _median(large))]
    said += [(ARMS_IN_WORDS[same[0]["arm"]], _median(same)) for same in references]
    (first, ratio), rest = said[0], [(name, value) for name, value in said[1:] if value]
    if not ratio:
        what = "noise of any strength" if ratio == 0 else "a perturbation"
        return f"{_capital(first)}: {what} that changes the decision was found for less than half of the images."
    words = f"{_capital(first)} is fooled by {fraction(ratio)} the noise it withstands"
    if not rest:
        return f"{words}."
    return f"{words}; {listed([f'{name} by {fraction(value)} it' for name, value in rest])}."


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _median(models: list[Model]) -> float | None:
    """The median ratio, its geometric mean over seeds; None where a seed has none, and 0 where that of one is 0."""
    values = [m["ratio_median"]["value"] for m in models]
    if None in values:
        return None
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(np.array(values, dtype=float)).mean()))


def _medians(models: list[Model], rules: Rules) -> list[Statistic]:
    if len(models) == 1:
        return [Statistic(name=f"median ratio, {who(models)}", estimate=models[0]["ratio_median"], p=None)]
    value = _median(models)
    if not value:
        return [stated(f"median ratio, {who(models)}", len(models), value, rules.confidence)]
    logs = over_seeds(np.log(np.array([m["ratio_median"]["value"] for m in models], dtype=float)), rules.confidence)
    low, high = (math.nan if v is None else math.exp(v) for v in (logs["low"], logs["high"]))
    name = f"median ratio, {who(models)}, geometric mean over seeds"
    return [bounded(name, len(models), value, low, high, rules.confidence)]


def _ratio(arm: str, reference: str, comparisons: list[Comparison], rules: Rules) -> Statistic:
    """Factor by which the ratio exceeds a reference's."""
    low, value, high, n = _limits(differences(comparisons, arm, reference, "log ratio"), rules)
    name = f"ratio over that of {ARMS_IN_WORDS[reference]}, same images"
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(v)) for v in (value, low, high))
    return bounded(name, n, value, low, high, rules.confidence)


def _gain(arm: str, comparisons: list[Comparison], rules: Rules) -> Statistic:
    low, value, high, n = _limits(differences(comparisons, arm, "softmax", "clean accuracy"), rules)
    return bounded("clean accuracy over that of softmax regression", n, value, low, high, rules.confidence)


def _limits(rows: list[Comparison], rules: Rules) -> tuple[float, float, float, int]:
    """Lower limit, value, upper limit and number of images, over images and seeds; unknown limits are infinite."""
    if not rows:
        return -math.inf, math.nan, math.inf, 0
    whole = next((c for c in rows if c["seed"] is None), rows[0])["difference"]
    seeds = [c["difference"]["value"] for c in rows if c["seed"] is not None]
    values = np.array([math.nan if v is None else v for v in seeds])
    low = -math.inf if whole["low"] is None else whole["low"]
    high = math.inf if whole["high"] is None else whole["high"]
    least, most = decisions.over_images_and_seeds(np.array(low), np.array(high), values, rules)
    value = math.nan if whole["value"] is None else whole["value"]
    return float(least), value, float(most), whole["n"]


def _decide(tested: list[Statistic], gain: Statistic, rules: Rules) -> int:
    low = np.array([-math.inf if not s["estimate"]["low"] else math.log(s["estimate"]["low"]) for s in tested])
    high = np.array([math.inf if s["estimate"]["high"] is None else math.log(s["estimate"]["high"]) for s in tested])
    least = gain["estimate"]["low"]
    return int(decisions.ratios(low, high, np.array(-math.inf if least is None else least), rules))


def _deep(gain: Statistic, rules: Rules) -> bool:
    low = gain["estimate"]["low"]
    return low is not None and low > rules.nonlinear_gain


def _spoken(
    references: list[str], tested: list[Statistic], gain: Statistic, found: int, rules: Rules
) -> tuple[str, str]:
    """Why, and what would change it."""
    limits = {ARMS_IN_WORDS[r]: s["estimate"] for r, s in zip(references, tested, strict=True)}
    margin = f"{rules.ratio_margin:g}"
    if not _deep(gain, rules):
        value, low = gain["estimate"]["value"], gain["estimate"]["low"]
        if value is None or low is None:
            seen = "How much more accurate the network is than softmax regression is not known"
        else:
            seen = (
                f"The network's clean accuracy is {points(value, 'above', 'below')} that of softmax regression (lower "
                f"limit: {points(low, 'above', 'below')})"
            )
        because = (
            f"{seen}, where a lower limit of more than {100 * rules.nonlinear_gain:g} points above is needed: it is "
            "not shown to be more than a linear model, so nothing follows about deep networks."
        )
        return because, "A network that is more accurate than softmax regression."
    if found == 1:
        shown = listed([f"{e['high']:.2f} ({name})" for name, e in limits.items()])
        worst = max(e["high"] or math.inf for e in limits.values())
        because = f"The ratio is at most {margin} times that of every reference; the upper limits are {shown}."
        return because, f"It would be undetermined with an upper limit {rules.ratio_margin / worst:.2f} times as high."
    if found == -1:
        shown = listed([f"{e['low']:.2f} ({name})" for name, e in limits.items()])
        least = min(e["low"] or 0.0 for e in limits.values())
        because = f"The ratio is more than {margin} times that of every reference; the lower limits are {shown}."
        return because, f"It would be undetermined with a lower limit {least / rules.ratio_margin:.2f} times lower."
    open_ = [
        f"{name} ({'no limit' if e['low'] is None else format(e['low'], '.2f')} to "
        f"{'no limit' if e['high'] is None else format(e['high'], '.2f')}, n = {e['n']})"
        for name, e in limits.items()
        if e["high"] is None or e["high"] > rules.ratio_margin
    ]
    because = (
        f"The ratio is not shown to be at most {margin} times that of {listed(open_)}, nor to be more than that for "
        "every reference."
    )
    return because, "More attacked images would narrow the intervals; the power note says how many."


def _transfers(large: list[Model], transfer: list[Transfer], rules: Rules) -> list[Statistic]:
    """How often perturbations made for other models fool this arm's, and noise of the same norm; not tested."""
    names, found = {m["name"] for m in large}, []
    rows = [t for t in transfer if t["target"] in names and t["source"] != t["target"]]
    for strength in sorted({t["strength"] for t in rows}):
        for disjoint, which in ((False, "other models"), (True, "models trained on disjoint images")):
            chosen = [t for t in rows if t["strength"] == strength and t["disjoint"] == disjoint]
            for label, shares in (
                (f"fooled by perturbations made for {which}", [t["fooled"] for t in chosen]),
                (f"fooled by noise of the same norm, beside {which}", [t["noise"] for t in chosen]),
            ):
                n = sum(share["n"] for share in shares)
                if n:
                    value = sum(share["k"] for share in shares) / n
                    found.append(stated(f"share {label}, L2 norm {strength:g}", n, value, rules.confidence))
    return found
