"""Tables of perturbed images: under attacks, under the stronger suite, under corruptions, and transfer."""

from fastlip._text import printable
from fastlip.study.report.arms import title
from fastlip.study.report.number_format import (
    attack_name,
    ball_name,
    brackets,
    distortion,
    interval,
    number,
    percent,
    share,
    stretch_at_features,
    stretch_at_logits,
    title_prefix,
)
from fastlip.study.report.tables import Table
from fastlip.study.report.transfer_cells import transfer_cells
from fastlip.study.storage.schema import Results


def smallest_table(results: Results) -> Table:
    """How large the smallest perturbations are, with the share found and the mean with the rest at the ceiling."""
    rows = [
        (
            title(m),
            name,
            percent(s["found"]),
            distortion(s["median"]),
            distortion(s["mean"]),
            distortion(s["mean_with_ceiling"]),
            number(s["ceiling"], 255.0),
        )
        for m in results["models"]
        for name, s in (("PGD", m["smallest_pgd"]), ("Gaussian", m["smallest_gaussian"]))
    ]
    return Table(
        "smallest",
        f"{title_prefix(results)}: smallest perturbations found",
        ("Model", "Search", "Found", "Median", "Mean of Those Found", "Mean with the Rest at the Ceiling", "Ceiling"),
        tuple(rows),
        "Distortions × 255, over images classified correctly. A search that finds nothing up to its ceiling says that "
        "the smallest perturbation is larger: the median counts it as infinite, the first mean leaves it out, and the "
        f"second takes the ceiling for it, which is from below. {brackets(results)}",
        keys=2,
    )


def attack_table(results: Results) -> Table:
    """Accuracy, distortion and stretch under each attack at each fixed strength."""
    rows = [
        (
            title(model),
            attack_name(attack),
            percent(attack["accuracy"]),
            distortion(attack["distortion"]),
            stretch_at_logits([attack]),
            stretch_at_features([attack]),
        )
        for model in results["models"]
        for attack in model["attacks"]
    ]
    return Table(
        "attacks",
        f"{title_prefix(results)}: attacks at fixed strength",
        ("Model", "Attack", "Accuracy", "Average Distortion", "Stretch at the Logits", "Stretch at Feature Maps"),
        tuple(rows),
        "Accuracy over all attacked images; distortion (× 255) and stretch over those classified correctly when clean. "
        "Stretch: mean and largest; at feature maps from the least to the largest mean over depth. PGD stops at the "
        f"first iterate that is misclassified, so its distortion can stay below its budget. {brackets(results)}",
        keys=2,
    )


def strong_table(results: Results) -> Table:
    """Accuracy under the stronger suite as one attack after the other is added."""
    rows = [
        (title(model), ball_name(s["norm"], s["strength"]), printable(name), percent(p))
        for model in results["models"]
        for s in model["strong"]
        for name, p in [
            ("none", model["attacked_clean"]),
            *((m["name"], m["accuracy"]) for m in s["members"]),
            ("all together", s["accuracy"]),
        ]
    ]
    return Table(
        "strong",
        f"{title_prefix(results)}: the stronger suite",
        ("Model", "Ball", "Attack", "Accuracy"),
        tuple(rows),
        "APGD with cross-entropy, then towards the likeliest wrong classes, then Square (black box), each on the "
        "images that stood the one before it; PGD by itself. An image counts as right only where it stands under all "
        f"of them. It is not AutoAttack. {brackets(results)}",
        keys=2,
    )


def corruption_table(results: Results) -> Table:
    """Accuracy, average distortion and stretch of each model under each corruption."""
    rows = []
    for model in results["models"]:
        found = model["corruptions"]
        rows.append(
            (title(model), "all", "all", interval(found["mean"], 100.0), distortion(found["distortion"]), "–", "–")
        )
        rows += [
            (
                title(model),
                printable(c["corruption"]),
                str(c["severity"]),
                percent(c["accuracy"]),
                distortion(c["distortion"]),
                number(c["stretch"]["mean"]["value"]),
                number(c["stretch"]["largest"]),
            )
            for c in found["rows"]
        ]
    return Table(
        "corruptions",
        f"{title_prefix(results)}: common corruptions",
        ("Model", "Corruption", "Severity", "Accuracy", "Average Distortion", "Mean Stretch", "Largest Stretch"),
        tuple(rows),
        f"Corruptions: {corruption_source(results)}. Distortions × 255. The mean accuracy over all, in per cent, has "
        f"an interval over images. Stretch at the logits. {brackets(results)}",
        keys=3,
    )


def corrupted_table(results: Results) -> Table:
    """Average distortion by corruption and severity, which no model has a part in."""
    model = results["models"][0]
    found = model["corruptions"]
    severities = sorted({c["severity"] for c in found["rows"]})
    at = {(c["corruption"], c["severity"]): c["distortion"]["value"] for c in found["rows"]}
    rows = [
        (printable(name), *(number(at.get((name, s)), 255.0) for s in severities))
        for name in dict.fromkeys(c["corruption"] for c in found["rows"])
    ]
    return Table(
        "corrupted",
        f"{title_prefix(results)}: average distortion under common corruptions",
        ("Corruption", *(f"Severity {s}" for s in severities)),
        tuple(rows),
        f"Mean over images of √(Σ(x′−x)²/n), × 255; over all corruptions {distortion(found['distortion'])}. The images "
        f"are the same for all models. Corruptions: {corruption_source(results)}.",
    )


def corruption_source(results: Results) -> str:
    if results["models"][0]["corruptions"]["source"] == "generated":
        return "made with torchvision and Pillow, strengths of our own, not comparable with CIFAR-10-C"
    return "CIFAR-10-C's files"


def transfer_table(results: Results) -> Table:
    """The cross table of transfer: a row for each source and strength, a column for each target."""
    cells = transfer_cells(results)
    rows = [
        (
            source,
            f"{strength:g}",
            *(
                "–"
                if (at := cells.at(strength, source, target)) is None
                else f"{share(at.fooled)} / {share(at.noise)}{' †' if at.disjoint else ''}"
                for target in cells.names
            ),
        )
        for strength in cells.strengths
        for source in cells.names
    ]
    return Table(
        "transfer",
        f"{title_prefix(results)}: transfer of adversarial examples",
        ("Made for", "L2 Norm", *(f"Judged by {name}" for name in cells.names)),
        tuple(rows) if results["transfer"] else (),
        "Share of images, which both models classify correctly, that the judge gets wrong: under the perturbation made "
        "for the other model, scaled to the L2 norm (pixels in [0, 1]), and after the stroke under Gaussian noise of "
        f"the same norm.{cells.note} † trained on disjoint images. tables/results.csv has every pair with its "
        "interval.",
        keys=2,
    )
