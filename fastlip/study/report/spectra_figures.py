"""Figures of spectra: ranks of features, distances and singular values of weights."""

import math

import numpy as np
from matplotlib.axes import Axes

from fastlip.study.report.drawing import DASHES, Figure, Rows, counts_across, draw_figure, line
from fastlip.study.storage.schema import Results


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
                line(axes, model, range(len(value)), value, DASHES[condition])
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
    return draw_figure(results, "feature-rank", caption, draw, rows, header)


def weight_figure(results: Results) -> Figure:
    """Relative distance of each weight from its value at the beginning of training."""
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
    return draw_figure(results, "weight-distance", caption, draw, rows, header)


def profile_figure(results: Results) -> Figure:
    """Singular values of the first and the last 3×3 kernel of each network."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            rows.extend(
                (model["name"], w["layer"], i / 10, v) for w in model["weights"] for i, v in enumerate(w["profile"])
            )
            convolutions = [w for w in model["weights"] if w["layer"].endswith("conv2")] or model["weights"]
            for dashes, w in zip(("-", ":"), (convolutions[0], convolutions[-1]), strict=True):
                line(axes, model, np.linspace(0, 1, 11), w["profile"], dashes)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("rank, as a share of all singular values")
        axes.set_ylabel("singular value / largest")

    caption = (
        "Singular values of the first (solid) and the last (dotted) 3×3 kernel, flattened to [outputs, inputs × 9]. "
        "The data hold every layer."
    )
    return draw_figure(results, "weight-profiles", caption, draw, rows, ("model", "layer", "rank", "value"))
