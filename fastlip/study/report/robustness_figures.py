"""Figures of robustness: accuracy under attacks, noise and corruptions, and smallest distortions."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from fastlip.study.report.arms import ARM_COLOURS
from fastlip.study.report.drawing import Figure, Rows, draw_figure, line, shares_upward
from fastlip.study.storage.schema import AttackSummary, Results


def accuracy_figures(results: Results) -> list[Figure]:
    """Accuracy by strength: PGD in each norm, with noise of the same norm as the control, and Gaussian noise."""
    drawings = [
        _accuracy(results, "accuracy-linf", "PGD, L∞", "radius ε in 255ths", lambda a: a["norm"] == "linf", 255.0),
        _accuracy(results, "accuracy-l2", "PGD, L2", "radius ε, pixels in [0, 1]", lambda a: a["norm"] == "l2", 1.0),
        _accuracy(results, "accuracy-l1", "PGD, L1", "radius ε, pixels in [0, 1]", lambda a: a["norm"] == "l1", 1.0),
        _accuracy(
            results, "accuracy-gaussian", "Gaussian noise", "σ, pixels in [0, 1]", lambda a: a["norm"] is None, 1.0
        ),
    ]
    return [figure for figure in drawings if figure.csv.count("\n") > 1 + len(results["models"])]


def distortion_figure(results: Results, distortions: dict[str, dict[str, np.ndarray]]) -> Figure:
    """The proportion of images whose decision changes at a distortion of at most x.

    Args:
        results: of the run.
        distortions: the smallest distortions by name of the model and "pgd" or "gaussian", [N] in [0, 1]; inf where
            none was found.
    """
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            for kind, dashes in (("pgd", "-"), ("gaussian", ":")):
                values = np.sort(distortions[model["name"]][kind]) * 255
                shares = np.arange(1, len(values) + 1) / max(len(values), 1)
                found = np.isfinite(values) & (values > 0)
                line(axes, model, values[found], shares[found], dashes, drawstyle="steps-post")
                rows.extend((model["name"], kind, float(v), float(s)) for v, s in zip(values, shares, strict=True))
        axes.set_xscale("log")
        shares_upward(axes)
        axes.set_xlabel("smallest distortion that changes the decision (× 255)")
        axes.set_ylabel("share of images")

    caption = (
        "Share of correctly classified images whose decision changes at a distortion of at most x. Solid: the smallest "
        "perturbation found by PGD; dotted: the smallest Gaussian noise found. A curve that ends below 100% marks "
        "images on which nothing was found."
    )
    return draw_figure(
        results, "smallest-distortion", caption, draw, rows, ("model", "perturbation", "distortion_x255", "share"), 4.8
    )


def corruption_figure(results: Results) -> Figure:
    """Accuracy by severity, averaged over corruptions."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            found = model["corruptions"]["rows"]
            severities = sorted({c["severity"] for c in found})
            value = [np.mean([c["accuracy"]["value"] for c in found if c["severity"] == s]) for s in severities]
            line(axes, model, severities, value, marker="o")
            rows.extend(
                (model["name"], c["corruption"], c["severity"], c["accuracy"]["k"], c["accuracy"]["n"]) for c in found
            )
        shares_upward(axes)
        axes.set_xticks(range(1, 6))
        axes.set_xlim(0.7, 5.3)
        axes.set_xlabel("severity")
        axes.set_ylabel("accuracy, mean over corruptions")

    source = results["models"][0]["corruptions"]["source"]
    made = (
        "the files of CIFAR-10-C"
        if source == "cifar10c"
        else "corruptions made with torchvision and Pillow, not CIFAR-10-C"
    )
    caption = f"Accuracy under common corruptions by severity, averaged over them: {made}."
    return draw_figure(results, "corruptions", caption, draw, rows, ("model", "corruption", "severity", "k", "n"), 4.8)


def _accuracy(
    results: Results, name: str, title: str, label: str, chosen: Callable[[AttackSummary], bool], scale: float
) -> Figure:
    rows: Rows = []

    def draw(axes: Axes) -> None:
        ticks = ["0"]
        for model in results["models"]:
            attacks = sorted((a for a in model["attacks"] if chosen(a)), key=lambda a: a["strength"])
            rates = [model["attacked_clean"], *(a["accuracy"] for a in attacks)]
            strengths = [0.0, *(a["strength"] * scale for a in attacks)]
            ticks = [f"{v:g}" for v in strengths]
            x = np.arange(len(rates))
            value = np.array([r["value"] for r in rates], dtype=float)
            low, high = [r["low"] for r in rates], [r["high"] for r in rates]
            axes.fill_between(x, low, high, color=ARM_COLOURS[model["arm"]], alpha=0.16, lw=0)
            line(axes, model, x, value, marker="o", markersize=4)
            noise = [model["attacked_clean"], *(a["noise_accuracy"] for a in attacks)]
            kept = [None if r is None else r["value"] for r in noise]
            if None not in kept[1:]:
                line(axes, model, x, np.array(kept, dtype=float), ":", linewidth=1.2)
            rows.extend(
                (model["name"], v, r["k"], r["n"], r["value"], r["low"], r["high"], control)
                for v, r, control in zip(strengths, rates, kept, strict=True)
            )
        axes.set_xticks(range(len(ticks)), ticks)
        shares_upward(axes)
        axes.set_title(title)
        axes.set_xlabel(label)

    clean = results["models"][0]["attacked_clean"]
    caption = (
        f"{title}: accuracy by strength on {clean['n']} images, with {100 * clean['confidence']:g}% Clopper–Pearson "
        "bands. Strengths are not to scale."
    )
    if name != "accuracy-gaussian":
        caption += " Dotted: the control, Gaussian noise of the L2 norm that PGD used on each image."
    header = ("model", "strength", "k", "n", "accuracy", "low", "high", "accuracy_under_noise_of_same_norm")
    return draw_figure(results, name, caption, draw, rows, header, 4.2)
