"""Tables of a whole run: the models, the table of the slide deck, means over seeds, and the power analysis."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fastlip._text import printable
from fastlip.study.analysis.statistics import ANY, NOT_NEGATIVE, SHARE, over_seeds
from fastlip.study.report.arms import arms_of, over_bounds, several_seeds, title
from fastlip.study.report.number_format import (
    attack_name,
    brackets,
    confidence,
    count,
    distortion,
    interval,
    number,
    percent,
    power,
    share,
    stretch_at_features,
    stretch_at_logits,
    title_prefix,
)
from fastlip.study.report.tables import Table
from fastlip.study.storage.schema import Estimate, Model, Results, Smallest

_DISTORTION = "√(Σ(x′−x)²/n) over an image's n pixel values, × 255"

#: Of numbers from several models, which have another interval than those of one.
_OVER_SEEDS = "Where n counts seeds, a number is the mean over seeds with Student's t interval."


def model_table(results: Results) -> Table:
    """The models at a glance, one in each row."""
    rows = [
        (
            title(m),
            count(m["parameters"]),
            percent(m["clean"]),
            distortion(m["smallest_pgd"]["median"]),
            distortion(m["smallest_gaussian"]["median"]),
            interval(m["ratio_median"]),
            number(m["flat_boundary"]["ratio"]),
            percent(m["gaussian_of_same_norm"]),
        )
        for m in results["models"]
    ]
    return Table(
        "models",
        f"{title_prefix(results)}: the models at a glance",
        (
            "Model",
            "Parameters",
            "Clean Accuracy",
            "Median Smallest PGD Distortion × 255",
            "Median Smallest Gaussian Distortion × 255",
            "Median Ratio PGD / Gaussian",
            "Ratio for a Flat Boundary",
            "Accuracy under Gaussian Noise of the Smallest PGD Norm",
        ),
        tuple(rows),
        f"Distortion: {_DISTORTION}. Medians are over correctly classified images, those on which nothing was found "
        "counted as infinite. The flat boundary is what geometry alone predicts for as many pixels and directions "
        "(Fawzi et al. 2016). The last column is the fair control: random noise exactly as long as the perturbation "
        f"that fooled the model. {brackets(results)}",
    )


def seed_table(results: Results) -> Table:
    """The table of the slide deck behind this project: our arms first, the deck's rows below."""
    rows = []
    for arm in arms_of(results):
        who = title(arm.models[0]) if len(arm.models) == 1 else f"{arm.name} ({len(arm.models)} seeds)"
        rows += _deck_shaped(who, arm.models)
    for deck in results["seed_deck"]:
        n = deck["clean_accuracy"]["n"]
        accuracy = deck["clean_accuracy"]["value"]
        rows.append(
            (
                f"{printable(deck['model'])} (seed deck)",
                printable(deck["attack"]),
                f"{deck['average_distortion']:.2f}",
                "not stated",
                "–",
                "–",
                f"{deck['upper_lipschitz_constant']:.2f} (of what, not stated)",
                "–" if accuracy is None else f"{accuracy:.2%} (n = {n} is inferred)",
            )
        )
    return Table(
        "seed",
        f"{title_prefix(results)}: average distortion, stretch, Lipschitz constant, clean accuracy",
        _DECK_HEADER,
        tuple(rows),
        f"Average distortion: mean of {_DISTORTION}, for the smallest perturbation found that changes the decision (L2 "
        "search by PGD; search over σ along drawn Gaussian directions), over the correctly classified images on which "
        "one was found; beside it the share of these, and the mean with the others at the largest distortion tried. "
        "Stretch: ‖φ(x′)−φ(x)‖/‖x′−x‖ under this attack, observed at the logits and, from the least to the largest "
        "mean over depth, at the feature maps; this is what differs between attacks, and what the deck's constants "
        "look like. Upper Lipschitz constant: certified L2 bound of the whole network, the same for both attacks. "
        f"{brackets(results)} {_OVER_SEEDS if several_seeds(results) else ''}{over_bounds(results)} The seed deck, "
        "the slides whose claims this study puts to the test, states neither the scale of its distortions, nor what "
        "its constants bound, nor its sample size: 96 is an inference, since both accuracies are whole numbers of 96 "
        "images, which 3,326 of the sample sizes up to 10,000 would allow.",
        keys=2,
    )


def seed_by_seed_table(results: Results) -> Table:
    """The rows of :func:`seed_table` for every model; it has none where there is one seed."""
    rows = [row for m in results["models"] for row in _deck_shaped(title(m), [m])] if several_seeds(results) else []
    return Table(
        "seeds",
        f"{title_prefix(results)}: average distortion, stretch, Lipschitz constant, clean accuracy, seed by seed",
        _DECK_HEADER,
        tuple(rows),
        f"As in the table over seeds. {brackets(results)}",
        keys=2,
    )


_DECK_HEADER = (
    "Model",
    "Attack",
    "Average Distortion × 255",
    "Found; Rest at the Ceiling",
    "Stretch at the Logits",
    "Stretch at Feature Maps",
    "Upper Lipschitz Constant",
    "Clean Accuracy",
)


def _deck_shaped(who: str, models: Sequence[Model]) -> list[tuple[str, ...]]:
    """Two rows, for noise and for PGD, of one model or over the seeds of an arm."""
    first = models[0]
    if len(models) == 1:
        bound = first["lipschitz"]
        upper = f"{power(bound['log10_upper'])} (confidence {confidence(bound['confidence'])})"
        clean = percent(first["clean"])
    else:
        logs = [m["lipschitz"]["log10_upper"] for m in models]
        upper = f"{power(min(logs))} to {power(max(logs))}"
        clean = interval(_over(models, lambda m: m["clean"]["value"], SHARE), 100.0).replace(" [", "% [")
    rows: list[tuple[str, ...]] = []
    for attack in ("Gaussian", "PGD"):
        several = [_searched(m, attack) for m in models]
        mean = several[0]["mean"] if len(models) == 1 else _over(models, partial(_mean_of, attack))
        rows.append(
            (
                who,
                attack,
                distortion(mean),
                _found(several),
                stretch_at_logits(several),
                stretch_at_features(several),
                upper,
                clean,
            )
        )
    return rows


def _searched(model: Model, attack: str) -> Smallest:
    return model["smallest_pgd"] if attack == "PGD" else model["smallest_gaussian"]


def _mean_of(attack: str, model: Model) -> float | None:
    return _searched(model, attack)["mean"]["value"]


def _found(several: Sequence[Smallest]) -> str:
    """The share of images on which something was found, and the mean distortion with the others at the ceiling."""
    n = sum(s["found"]["n"] for s in several)
    ceilings = [s["mean_with_ceiling"]["value"] for s in several]
    known = [v for v in ceilings if v is not None]
    mean = sum(known) / len(known) if known and len(known) == len(ceilings) else None
    return f"{share(sum(s['found']['k'] for s in several) / n if n else None)}; {number(mean, 255.0)}"


def _over(
    models: Sequence[Model], value: Callable[[Model], float | None], possible: tuple[float, float] = NOT_NEGATIVE
) -> Estimate:
    """The mean over seeds; it does not exist where a seed has no value, since the others would be a selection."""
    values = [value(model) for model in models]
    found = [v for v in values if v is not None]
    complete = np.array(found if len(found) == len(values) else [], dtype=float)
    return over_seeds(complete, models[0]["clean"]["confidence"], possible)


def arm_table(results: Results) -> Table:
    """Means over seeds, which statements about training need; it has no rows where there is one seed."""
    arms = arms_of(results)

    def row(
        name: str,
        value: Callable[[Model], float | None],
        scale: float = 1.0,
        possible: tuple[float, float] = NOT_NEGATIVE,
    ) -> tuple[str, ...]:
        return name, *(interval(_over(arm.models, value, possible), scale) for arm in arms)

    rows = [
        row("clean accuracy, %", lambda m: m["clean"]["value"], 100.0, SHARE),
        row("median smallest PGD distortion × 255", lambda m: m["smallest_pgd"]["median"]["value"], 255.0),
        row("median smallest Gaussian distortion × 255", lambda m: m["smallest_gaussian"]["median"]["value"], 255.0),
        row("median ratio PGD / Gaussian", lambda m: m["ratio_median"]["value"]),
        row("ratio for a flat boundary", lambda m: m["flat_boundary"]["ratio"]),
        *(
            row(f"accuracy, {attack_name(attack)}, %", partial(_accuracy_under, i), 100.0, SHARE)
            for i, attack in enumerate(results["models"][0]["attacks"])
        ),
        row("accuracy under corruptions, mean, %", lambda m: m["corruptions"]["mean"]["value"], 100.0, SHARE),
        row("mean stretch at the logits, smallest PGD", lambda m: m["smallest_pgd"]["stretch"]["mean"]["value"]),
        row("mean stretch at the logits, smallest noise", lambda m: m["smallest_gaussian"]["stretch"]["mean"]["value"]),
        row("largest observed stretch", lambda m: m["largest_stretch"]),
        row("log10 of the certified upper Lipschitz constant", lambda m: m["lipschitz"]["log10_upper"], possible=ANY),
        row("mean norm of the Jacobian at images", lambda m: m["jacobian"]["mean"]["value"]),
    ]
    level = results["models"][0]["clean"]["confidence"]
    return Table(
        "arms",
        f"{title_prefix(results)}: means over seeds",
        ("Measure", *(arm.name for arm in arms)),
        tuple(rows) if several_seeds(results) else (),
        f"Means over seeds with Student's t intervals at {100 * level:g}%; n counts seeds. Seeds share test images and "
        "training images: intervals are over initial weights, order and augmentation."
        f"{over_bounds(results)}",
    )


def _accuracy_under(attack: int, model: Model) -> float | None:
    return model["attacks"][attack]["accuracy"]["value"]


def power_table(results: Results) -> Table:
    rows = [
        (
            str(row["question"]),
            printable(row["assumption"]),
            row["expected"],
            "no size tried would do" if row["needed"] is None else f"{row['needed']} {printable(row['unit'])}",
            "–" if row["had"] is None else str(row["had"]),
            share(row["probability"]),
        )
        for row in results["power"]
    ]
    return Table(
        "power",
        f"{title_prefix(results)}: how much each question needs",
        ("Question", "If", "Verdict Expected", "Needed", "This Run Had", "Chance at the Preset's Size"),
        tuple(rows),
        "By simulation of the rule itself: the size at which the verdict expected comes with the chance set by "
        "rules.power, and the chance of it at the preset's size. config.json has the same, from before the run.",
        keys=2,
    )
