"""Figures by depth: norms of layers, observed stretch, and spectra of features and weights."""

import math

import numpy as np
from matplotlib.axes import Axes

from fastlip.study.report.drawing import ARM_COLOURS, Figure, Rows, counts_across, drawn, line
from fastlip.study.storage.schema import Results

_DASHES = {"pgd": "-", "gaussian": ":", "clean": "--"}


def layer_figure(results: Results) -> Figure:
    """Certified operator norms by depth."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            layers = model["lipschitz"]["layers"]
            depth = np.arange(1, len(layers) + 1)
            lower, upper = (np.array([layer[side] for layer in layers]) for side in ("lower", "upper"))
            line(axes, model, depth, upper, linewidth=1.2, marker="o", markersize=3)
            axes.vlines(depth, lower, upper, color=ARM_COLOURS[model["arm"]], linewidth=3, alpha=0.4)
            rows.extend(
                (model["name"], int(d), layer["name"], layer["kind"], layer["lower"], layer["upper"])
                for d, layer in zip(depth, layers, strict=True)
            )
        axes.set_yscale("log")
        axes.set_xlabel("layer, in order of execution")
        axes.set_ylabel("L2 operator norm, BatchNorm folded")
        counts_across(axes)

    caption = (
        "Certified operator norm of each layer as the network applies it, BatchNorm folded in. Points: upper sides; "
        "bars down to the lower sides, mostly narrower than the points."
    )
    return drawn(results, "layer-norms", caption, draw, rows, ("model", "depth", "layer", "kind", "lower", "upper"))


def stretch_figure(results: Results) -> Figure:
    """Observed stretch from the input up to each block, under the smallest perturbations."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            points = [*model["depth_points"], "logits"]
            for kind, smallest in (("pgd", model["smallest_pgd"]), ("gaussian", model["smallest_gaussian"])):
                depth, logits = smallest["depth"], smallest["stretch"]
                if not depth["mean"] or logits["mean"]["value"] is None or logits["largest"] is None:
                    continue
                mean = [*depth["mean"], logits["mean"]["value"]]
                largest = [*depth["largest"], logits["largest"]]
                x = np.arange(1, len(mean) + 1)
                line(axes, model, x, mean, _DASHES[kind])
                rows.extend((model["name"], kind, p, m, top) for p, m, top in zip(points, mean, largest, strict=True))
        axes.set_yscale("log")
        axes.set_xlabel("residual block, the stem first and the logits last")
        axes.set_ylabel("mean stretch ‖φ(x′)−φ(x)‖ / ‖x′−x‖")
        counts_across(axes)

    caption = (
        "Observed stretch of the smallest perturbations from the input up to each block. Solid: PGD; dotted: Gaussian "
        "noise."
    )
    header = ("model", "perturbation", "after", "mean", "largest")
    return drawn(results, "observed-stretch", caption, draw, rows, header)


def growth_figure(results: Results) -> Figure:
    """Relative change of the features by stage."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        stages: list[str] = []
        for model in results["models"]:
            for condition in ("pgd", "gaussian"):
                chosen = [g for g in model["growth"] if g["condition"] == condition]
                stages = [g["stage"] for g in chosen]
                value = [math.nan if g["relative"]["value"] is None else g["relative"]["value"] for g in chosen]
                line(axes, model, range(len(value)), value, _DASHES[condition])
                rows.extend(
                    (
                        model["name"],
                        condition,
                        g["stage"],
                        g["relative"]["value"],
                        g["relative"]["low"],
                        g["relative"]["high"],
                    )
                    for g in chosen
                )
        axes.set_yscale("log")
        axes.set_xticks(range(len(stages)), stages)
        axes.set_ylabel("‖φ(x′)−φ(x)‖ / ‖φ(x)‖")

    caption = (
        "How a perturbation grows with depth: change of the features relative to the clean ones, averaged over the "
        "images that PGD moved. Solid: PGD at Linf; dotted: Gaussian noise of the same L2 norm."
    )
    return drawn(results, "growth", caption, draw, rows, ("model", "perturbation", "stage", "mean", "low", "high"))


def rank_figure(results: Results) -> Figure:
    """Effective rank of the features by stage."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        stages: list[str] = []
        for model in results["models"]:
            for condition in ("clean", "pgd"):
                chosen = [f for f in model["features"] if f["condition"] == condition]
                stages = [f["stage"] for f in chosen]
                value = [f["effective_rank"] for f in chosen]
                line(axes, model, range(len(value)), value, _DASHES[condition])
            rows.extend(
                (model["name"], f["condition"], f["stage"], f["effective_rank"], f["stable_rank"], f["largest"])
                for f in model["features"]
            )
        axes.set_xticks(range(len(stages)), stages)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("effective rank of the features")

    caption = (
        "Effective rank (exponential of the entropy of the singular values) of each stage's features over images and "
        "positions. Dashed: clean; solid: under PGD. It cannot exceed the number of channels, or of images where maps "
        "are 1×1."
    )
    header = ("model", "condition", "stage", "effective_rank", "stable_rank", "largest")
    return drawn(results, "feature-rank", caption, draw, rows, header)


def weight_figure(results: Results) -> Figure:
    """Distance of each weight from where its training began."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            distance = [math.nan if w["distance"] is None else w["distance"] for w in model["weights"]]
            depth = range(1, len(distance) + 1)
            line(axes, model, depth, distance)
            rows.extend(
                (model["name"], d, w["layer"], w["distance"], w["rank"], w["stable_rank"], w["effective_rank"])
                for d, w in zip(depth, model["weights"], strict=True)
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer, in order of definition")
        axes.set_ylabel("‖W−W₀‖ / ‖W₀‖")
        counts_across(axes)

    caption = (
        "Distance of each weight from where training began: the source's weights for transfer arms, their own random "
        "ones for the others."
    )
    header = ("model", "depth", "layer", "distance", "rank", "stable_rank", "effective_rank")
    return drawn(results, "weight-distance", caption, draw, rows, header)


def profile_figure(results: Results) -> Figure:
    """Singular value profiles of a weight in the middle of each network."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            rows.extend(
                (model["name"], w["layer"], i / 10, v) for w in model["weights"] for i, v in enumerate(w["profile"])
            )
            convolutions = [w for w in model["weights"] if w["layer"].endswith("conv2")]
            for dashes, w in zip(("-", ":"), (convolutions[0], convolutions[-1]), strict=True):
                line(axes, model, np.linspace(0, 1, 11), w["profile"], dashes)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("rank, as a share of all singular values")
        axes.set_ylabel("singular value / largest")

    caption = (
        "Singular values of the first (solid) and the last (dotted) 3×3 kernel, flattened to [outputs, inputs × 9]. "
        "The data hold every layer."
    )
    return drawn(results, "weight-profiles", caption, draw, rows, ("model", "layer", "rank", "value"))
