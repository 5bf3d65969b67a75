"""Tables of accuracy: under attacks, under the stronger suite, under corruptions."""

from fastlip.study.report.number_format import (
    attack_name,
    ball_name,
    brackets,
    distortion,
    interval,
    number,
    percent,
    title_prefix,
)
from fastlip.study.report.tables import Table
from fastlip.study.storage.schema import Results


def attack_table(results: Results) -> Table:
    """Accuracy, distortion and stretch under each attack at each fixed strength."""
    rows = [
        (
            model["name"],
            attack_name(attack),
            percent(attack["accuracy"]),
            distortion(attack["distortion"]),
            number(attack["stretch"]["mean"]["value"]),
            number(attack["stretch"]["largest"]),
        )
        for model in results["models"]
        for attack in model["attacks"]
    ]
    return Table(
        "attacks",
        f"{title_prefix(results)}: attacks at fixed strength",
        ("Model", "Attack", "Accuracy", "Average Distortion", "Mean Stretch", "Largest Stretch"),
        tuple(rows),
        "Accuracy over all attacked images; distortion (× 255) and stretch at the logits over those classified "
        "correctly when clean. PGD stops at the first iterate that is misclassified, so its distortion can stay below "
        f"its budget. {brackets(results)}",
    )


def strong_table(results: Results) -> Table:
    """Accuracy under the stronger suite as one attack after the other is added."""
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
        f"{title_prefix(results)}: the stronger suite",
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
        f"{title_prefix(results)}: common corruptions",
        ("Model", "Corruption", "Severity", "Accuracy"),
        tuple(rows),
        f"Corruptions: {how}. The mean over all, in per cent, has an interval over images. {brackets(results)}",
    )
