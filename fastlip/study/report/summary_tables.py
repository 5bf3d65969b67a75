"""Tables of a whole run: the table of the slide deck, means over seeds, and the power analysis."""

from collections.abc import Callable
from functools import partial

import numpy as np

from fastlip.study.analysis.statistics import over_seeds
from fastlip.study.report.arms import ARM_NAMES
from fastlip.study.report.number_format import (
    attack_name,
    brackets,
    confidence,
    distortion,
    interval,
    percent,
    power,
    title_prefix,
)
from fastlip.study.report.tables import Table
from fastlip.study.storage.schema import Model, Results


def seed_table(results: Results) -> Table:
    """The table of the slide deck behind this project: our rows first, the deck's rows below."""
    rows = []
    for model in results["models"]:
        who = f"{model['architecture']}, {ARM_NAMES[model['arm']]} (seed {model['seed']})"
        bound = model["lipschitz"]
        upper = f"{power(bound['log10_upper'])} (confidence {confidence(bound['confidence'])})"
        for name, smallest in (("Gaussian", model["smallest_gaussian"]), ("PGD", model["smallest_pgd"])):
            rows.append((who, name, distortion(smallest["mean"]), upper, percent(model["clean"])))
    for deck in results["seed_deck"]:
        rows.append(
            (
                f"{deck['model']} (seed deck)",
                deck["attack"],
                f"{deck['average_distortion']:.2f} (n = {deck['clean_accuracy']['n']})",
                f"{deck['upper_lipschitz_constant']:.2f}",
                percent(deck["clean_accuracy"]),
            )
        )
    return Table(
        "seed",
        f"{title_prefix(results)}: smallest perturbations, certified constants, clean accuracy",
        ("Model", "Attack", "Average Distortion", "Upper Lipschitz Constant", "Clean Accuracy"),
        tuple(rows),
        "Average distortion: mean over images of √(Σ(x′−x)²/n) × 255 for the smallest perturbation found that changes "
        "the decision (L2 search by PGD; search over σ along drawn Gaussian directions), over images classified "
        "correctly on which one was found. Upper Lipschitz constant: certified L2 bound of the whole network, the "
        f"same for both attacks. {brackets(results)} The seed deck states neither the scale of its distortions "
        "nor what its constants bound; they are shown for reference alone.",
    )


def arm_table(results: Results) -> Table:
    """Means over seeds, which statements about training need; it has no rows where there is one seed."""
    arms: dict[str, list[Model]] = {}
    for model in results["models"]:
        arms.setdefault(model["arm"], []).append(model)
    confidence = results["models"][0]["clean"]["confidence"]

    def row(name: str, value: Callable[[Model], float | None], scale: float = 1.0) -> tuple[str, ...]:
        cells = []
        for models in arms.values():
            values = [value(model) for model in models]
            found = [v for v in values if v is not None]
            # A seed has no value where a search found little: a mean over the others would select among the seeds.
            complete = np.array(found if len(found) == len(values) else [], dtype=float)
            cells.append(interval(over_seeds(complete, confidence), scale))
        return name, *cells

    rows = [
        row("clean accuracy, %", lambda m: m["clean"]["value"], 100.0),
        row("median smallest PGD distortion × 255", lambda m: m["smallest_pgd"]["median"]["value"], 255.0),
        row("median smallest Gaussian distortion × 255", lambda m: m["smallest_gaussian"]["median"]["value"], 255.0),
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
        f"{title_prefix(results)}: means over seeds",
        ("Measure", *(ARM_NAMES[arm] for arm in arms)),
        tuple(rows) if several else (),
        f"Means over seeds with Student's t intervals at {100 * confidence:g}%; n counts seeds. Seeds share test "
        "images, training images and source: intervals are over initial weights, order and augmentation.",
    )


def _accuracy_under(attack: int, model: Model) -> float | None:
    return model["attacks"][attack]["accuracy"]["value"]


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
        f"{title_prefix(results)}: how much each question needs",
        ("Question", "If", "Needed", "This run had"),
        tuple(rows),
        "For the chance of a verdict set by rules.power. Question 3: two-sided t test; question 4: Fisher's z for "
        "independent runs; both at the level of one comparison among all declared. config.json has the numbers needed.",
    )
