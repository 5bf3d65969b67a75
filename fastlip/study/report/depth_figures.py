"""Figures by depth: norms of layers, observed stretch, and the growth of perturbations."""

import math

import numpy as np
from matplotlib.axes import Axes

from fastlip.study.report.arms import ARM_COLOURS
from fastlip.study.report.drawing import DASHES, Figure, Rows, counts_across, draw_figure, line
from fastlip.study.storage.schema import Results


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
    return draw_figure(
        results, "layer-norms", caption, draw, rows, ("model", "depth", "layer", "kind", "lower", "upper")
    )


def stretch_figure(results: Results) -> Figure:
    """Observed stretch of the smallest perturbations from the input to each block."""
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
                line(axes, model, x, mean, DASHES[kind])
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
    return draw_figure(results, "observed-stretch", caption, draw, rows, header)


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
                line(axes, model, range(len(value)), value, DASHES[condition])
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
    return draw_figure(
        results, "growth", caption, draw, rows, ("model", "perturbation", "stage", "mean", "low", "high")
    )
