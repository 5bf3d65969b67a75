"""Further tables of a run: the stronger suite, corruptions, certificates, power, and every number in long form."""

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from fastlip.study.analysis.statistics import over_seeds
from fastlip.study.report.tables import ARM_NAMES, Table, attack_name, brackets, interval, of, percent
from fastlip.study.storage.schema import Model, Results

#: Columns of the table of every number.
LONG = ("model", "arm", "seed", "measure", "attack", "norm", "strength", "n", "value", "low", "high", "confidence")

_SMOOTH = (
    "From margins: the clean margin over the certified bound on the difference of two logits. Smoothed: the share of "
    "images whose class under Gaussian noise is right and certified within the radius (Cohen et al. 2019), each "
    "certificate wrong with probability at most α. It speaks about the smoothed classifier."
)


def more_tables(results: Results) -> list[Table]:
    return [
        arm_table(results),
        strong_table(results),
        corruption_table(results),
        certificate_table(results),
        power_table(results),
    ]


def arm_table(results: Results) -> Table:
    """Means over seeds, which are what training is judged by; no rows where there is one seed."""
    arms: dict[str, list[Model]] = {}
    for model in results["models"]:
        arms.setdefault(model["arm"], []).append(model)
    confidence = results["models"][0]["clean"]["confidence"]

    def row(name: str, value: Callable[[Model], float | None], scale: float = 1.0) -> tuple[str, ...]:
        cells = []
        for models in arms.values():
            values = [value(model) for model in models]
            found = [v for v in values if v is not None]
            # Seeds without a value are those where a search found little: the others would be a choice among seeds.
            complete = np.array(found if len(found) == len(values) else [], dtype=float)
            cells.append(interval(over_seeds(complete, confidence), scale))
        return name, *cells

    rows = [
        row("clean accuracy, %", lambda m: m["clean"]["value"], 100.0),
        row("median smallest PGD distortion × 255", lambda m: m["smallest_pgd"]["median"]["value"], 255.0),
        row("median smallest Gaussian distortion × 255", lambda m: m["smallest_gaussian"]["median"]["value"], 255.0),
        row("images below the ratio of questions 1 and 2, %", lambda m: m["ratio_share"]["value"], 100.0),
        *(
            row(f"accuracy, {attack_name(attack)}, %", partial(_accuracy_under, i), 100.0)
            for i, attack in enumerate(results["models"][0]["attacks"])
        ),
        row("accuracy under corruptions, mean, %", lambda m: m["corruptions"]["mean"]["value"], 100.0),
        row("log10 of the certified upper Lipschitz constant", lambda m: m["lipschitz"]["log10_upper"]),
        row("largest observed stretch", lambda m: m["largest_stretch"]),
        row("mean norm of the Jacobian at images", lambda m: m["jacobian"]["mean"]["value"]),
    ]
    several = max(map(len, arms.values())) > 1
    return Table(
        "arms",
        f"{of(results)}: means over seeds",
        ("Measure", *(ARM_NAMES[arm] for arm in arms)),
        tuple(rows) if several else (),
        f"Means over seeds with Student's t intervals at {100 * confidence:g}%; n counts seeds. Seeds share test "
        "images, training images and source: intervals are over initial weights, order and augmentation.",
    )


def ball_name(norm: str, eps: float) -> str:
    return f"L∞ ε = {eps * 255:g}/255" if norm == "linf" else f"{norm.upper()} ε = {eps:g}"


def _accuracy_under(attack: int, model: Model) -> float | None:
    return model["attacks"][attack]["accuracy"]["value"]


def strong_table(results: Results) -> Table:
    """Accuracy as one attack after the other is added."""
    rows = [
        (model["name"], ball_name(s["norm"], s["strength"]), name, percent(share))
        for model in results["models"]
        for s in model["strong"]
        for name, share in [
            ("none", model["attacked_clean"]),
            *((m["name"], m["accuracy"]) for m in s["members"]),
            ("all together", s["accuracy"]),
        ]
    ]
    return Table(
        "strong",
        f"{of(results)}: the stronger suite",
        ("Model", "Ball", "Attack", "Accuracy"),
        tuple(rows),
        "APGD with cross-entropy, then towards the likeliest wrong classes, then Square (black box), each on the "
        "images that stood the one before it; PGD by itself. An image counts as right only where it stands under all "
        f"of them. It is not AutoAttack. {brackets(results)}",
    )


def corruption_table(results: Results) -> Table:
    rows = []
    for model in results["models"]:
        found = model["corruptions"]
        rows.append((model["name"], "all", "all", interval(found["mean"], 100.0)))
        rows += [(model["name"], c["corruption"], str(c["severity"]), percent(c["accuracy"])) for c in found["rows"]]
    how = "CIFAR-10-C's files"
    if results["models"][0]["corruptions"]["source"] == "generated":
        how = "made with torchvision and Pillow, strengths of our own: not comparable with CIFAR-10-C"
    return Table(
        "corruptions",
        f"{of(results)}: common corruptions",
        ("Model", "Corruption", "Severity", "Accuracy"),
        tuple(rows),
        f"Corruptions: {how}. The mean over all, in per cent, has an interval over images. {brackets(results)}",
    )


def certificate_table(results: Results) -> Table:
    rows = []
    for model in results["models"]:
        log10 = model["margins"]["log10_radius"]
        radius = "none" if log10 is None else f"median radius 10^{log10:.1f}"
        rows += [
            (model["name"], f"margin over bound ({radius})", f"{c['radius']:g}", percent(c["accuracy"]))
            for c in model["margins"]["certified"]
        ]
        s = model["smoothing"]
        how = f"smoothed, σ = {s['sigma']:g}, {s['samples']} draws, α = {s['alpha']:g}"
        rows += [(model["name"], how, f"{c['radius']:g}", percent(c["accuracy"])) for c in s["certified"]]
    header = ("Model", "Certificate", "L2 Radius", "Certified Accuracy")
    return Table(
        "certificates", f"{of(results)}: certified accuracy", header, tuple(rows), f"{_SMOOTH} {brackets(results)}"
    )


def power_table(results: Results) -> Table:
    rows = [
        (
            str(row["question"]),
            row["assumption"],
            "no number would do" if row["needed"] is None else f"{row['needed']} {row['unit']}",
            "–" if row["had"] is None else str(row["had"]),
        )
        for row in results["power"]
    ]
    return Table(
        "power",
        f"{of(results)}: how much each question needs",
        ("Question", "If", "Needed", "This run had"),
        tuple(rows),
        "For the chance of a verdict set by rules.power. Question 3: two-sided t test; question 4: Fisher's z for "
        "independent runs; both at the level of one comparison among all declared. The plan is part of config.json.",
    )


def long_csv(results: Results) -> str:
    """Every number with its interval, one in each row; those of arms minus scratch last."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(LONG)
    writer.writerows(_long(results))
    return out.getvalue()


def _long(results: Results) -> Iterator[tuple[Any, ...]]:
    for model in results["models"]:
        who = (model["name"], model["arm"], model["seed"])

        def row(measure: str, e: Any, attack: str = "", norm: str = "", strength: Any = "", who: Any = who) -> Any:
            return (*who, measure, attack, norm, strength, e["n"], e["value"], e["low"], e["high"], e["confidence"])

        yield row("clean accuracy", model["clean"])
        yield row("accuracy of attacked images", model["attacked_clean"])
        for a in model["attacks"]:
            which = (a["attack"], a["norm"] or "", a["strength"])
            yield row("accuracy", a["accuracy"], *which)
            if a["noise_accuracy"] is not None:
                yield row("accuracy under noise of the same norm", a["noise_accuracy"], *which)
            yield row("average distortion", a["distortion"], *which)
            yield row("mean stretch", a["stretch"]["mean"], *which)
        for s in model["strong"]:
            yield row("accuracy", s["accuracy"], "stronger suite", s["norm"], s["strength"])
        for smallest in (model["smallest_pgd"], model["smallest_gaussian"]):
            yield row("share with a smallest perturbation", smallest["found"], smallest["attack"], "l2")
            yield row("median smallest distortion", smallest["median"], smallest["attack"], "l2")
            yield row("mean smallest distortion", smallest["mean"], smallest["attack"], "l2")
        yield row("share of ratios below the rule's", model["ratio_share"])
        yield row("median ratio", model["ratio_median"])
        yield row("mean Jacobian norm", model["jacobian"]["mean"])
        bound = model["lipschitz"]
        single = {"n": None, "low": None, "high": None, "confidence": None}
        certified = single | {"value": bound["log10_upper"], "confidence": bound["confidence"]}
        yield row("log10 of the certified upper Lipschitz constant", certified)
        yield row("largest observed stretch", single | {"value": model["largest_stretch"]})
        yield row("mean accuracy under corruptions", model["corruptions"]["mean"])
        for c in model["corruptions"]["rows"]:
            yield row("accuracy", c["accuracy"], c["corruption"], "", c["severity"])
        for at in model["smoothing"]["certified"]:
            yield row("certified accuracy, smoothed", at["accuracy"], "", "l2", at["radius"])
    for comparison in results["comparisons"]:
        # One arm minus scratch: no model of its own.
        e = comparison["difference"]
        numbers = (e["n"], e["value"], e["low"], e["high"], e["confidence"])
        yield (
            "",
            comparison["arm"],
            comparison["seed"],
            f"{comparison['measure']}, minus scratch",
            "",
            "",
            "",
            *numbers,
        )
