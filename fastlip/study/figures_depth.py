"""Figures by depth, along training and under corruptions, drawn like those of :mod:`fastlip.study.figures`."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastlip.study.figures import ARM_COLOURS, Figure, Rows, drawn, label_of, legend
from fastlip.study.schema import Results

_DASHES = {"pgd": "-", "gaussian": ":", "clean": "--"}
_NAMES = {"pgd": "PGD", "gaussian": "Gaussian of the same norm", "clean": "clean"}


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
                label = f"{label_of(results, model)}, {_NAMES[kind].split()[0]}"
                axes.plot(x, mean, _DASHES[kind], color=ARM_COLOURS[model["arm"]], label=label)
                rows.extend((model["name"], kind, p, m, top) for p, m, top in zip(points, mean, largest, strict=True))
        axes.set_yscale("log")
        axes.set_xlabel("residual block, the stem first and the logits last")
        axes.set_ylabel("mean stretch ‖φ(x′)−φ(x)‖ / ‖x′−x‖")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)

    caption = (
        "Observed stretch of the smallest perturbations from the input up to each block. Solid: PGD; dotted: Gaussian "
        "noise."
    )
    header = ("model", "perturbation", "after", "mean", "largest")
    return drawn("observed-stretch", caption, draw, rows, header, 5.4)


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
                label = f"{label_of(results, model)}, {_NAMES[condition].split()[0]}"
                axes.plot(range(len(value)), value, _DASHES[condition], color=ARM_COLOURS[model["arm"]], label=label)
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
        legend(axes)

    caption = (
        "How a perturbation grows with depth: change of the features relative to the clean ones, averaged over the "
        "images that PGD moved. Solid: PGD at Linf; dotted: Gaussian noise of the same L2 norm."
    )
    return drawn("growth", caption, draw, rows, ("model", "perturbation", "stage", "mean", "low", "high"), 5.4)


def rank_figure(results: Results) -> Figure:
    """Effective rank of the features by stage."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        stages: list[str] = []
        for model in results["models"]:
            for condition in ("clean", "pgd"):
                chosen = [f for f in model["features"] if f["condition"] == condition]
                stages = [f["stage"] for f in chosen]
                label = f"{label_of(results, model)}, {_NAMES[condition]}"
                value = [f["effective_rank"] for f in chosen]
                axes.plot(range(len(value)), value, _DASHES[condition], color=ARM_COLOURS[model["arm"]], label=label)
            rows.extend(
                (model["name"], f["condition"], f["stage"], f["effective_rank"], f["stable_rank"], f["largest"])
                for f in model["features"]
            )
        axes.set_xticks(range(len(stages)), stages)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("effective rank of the features")
        legend(axes)

    caption = (
        "Effective rank (exponential of the entropy of the singular values) of each stage's features over images and "
        "positions. Dashed: clean; solid: under PGD. It cannot exceed the number of channels, or of images where maps "
        "are 1×1."
    )
    header = ("model", "condition", "stage", "effective_rank", "stable_rank", "largest")
    return drawn("feature-rank", caption, draw, rows, header, 5.4)


def weight_figure(results: Results) -> Figure:
    """Distance of each weight from where its training began."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            distance = [math.nan if w["distance"] is None else w["distance"] for w in model["weights"]]
            depth = range(1, len(distance) + 1)
            axes.plot(depth, distance, color=ARM_COLOURS[model["arm"]], label=label_of(results, model))
            rows.extend(
                (model["name"], d, w["layer"], w["distance"], w["rank"], w["stable_rank"], w["effective_rank"])
                for d, w in zip(depth, model["weights"], strict=True)
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer, in order of definition")
        axes.set_ylabel("‖W−W₀‖ / ‖W₀‖")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)

    caption = (
        "Distance of each weight from where training began: the source's weights for transfer arms, their own random "
        "ones for the others."
    )
    header = ("model", "depth", "layer", "distance", "rank", "stable_rank", "effective_rank")
    return drawn("weight-distance", caption, draw, rows, header, 5.4)


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
                label = f"{label_of(results, model)}, {w['layer'].removeprefix('network.')}"
                axes.plot(np.linspace(0, 1, 11), w["profile"], dashes, color=ARM_COLOURS[model["arm"]], label=label)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("rank, as a share of all singular values")
        axes.set_ylabel("singular value / largest")
        legend(axes)

    caption = (
        "Singular values of the first (solid) and the last (dotted) 3×3 kernel, flattened to [outputs, inputs × 9]. "
        "The data hold every layer."
    )
    return drawn("weight-profiles", caption, draw, rows, ("model", "layer", "rank", "value"), 5.4)


def trajectory_figure(results: Results) -> Figure:
    """Certified constant against median smallest distortion, along training: what question 4 correlates."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            chosen = [p for p in results["points"] if p["run"] == model["name"] and p["median"] is not None]
            x = [p["log10_upper"] for p in chosen]
            y = [(p["median"] or 0.0) * 255 for p in chosen]
            colour = ARM_COLOURS[model["arm"]]
            axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1, label=label_of(results, model))
            if chosen:
                axes.plot(x[-1:], y[-1:], color=colour, marker="s", markersize=8, linestyle="none")
        rows.extend(
            (p["run"], p["epoch"] or "end", p["log10_upper"], p["stretch"], p["median"], p["accuracy"]["value"])
            for p in results["points"]
        )
        axes.set_xlabel("log10 of the certified upper Lipschitz constant")
        axes.set_ylabel("median smallest distortion (× 255)")
        legend(axes)

    caption = "What question 4 correlates: every training run with its snapshots in order; squares mark the end."
    header = ("run", "epoch", "log10_upper", "largest_stretch", "median_distortion", "accuracy")
    return drawn("trajectory", caption, draw, rows, header, 5.4)


def corruption_figure(results: Results) -> Figure:
    """Accuracy by severity, averaged over corruptions."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            found = model["corruptions"]["rows"]
            severities = sorted({c["severity"] for c in found})
            value = [np.mean([c["accuracy"]["value"] for c in found if c["severity"] == s]) for s in severities]
            axes.plot(severities, value, color=ARM_COLOURS[model["arm"]], marker="o", label=label_of(results, model))
            rows.extend(
                (model["name"], c["corruption"], c["severity"], c["accuracy"]["k"], c["accuracy"]["n"]) for c in found
            )
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xticks(range(1, 6))
        axes.set_xlim(0.7, 5.3)
        axes.set_xlabel("severity")
        axes.set_ylabel("accuracy, mean over corruptions")
        legend(axes)

    source = results["models"][0]["corruptions"]["source"]
    made = (
        "the files of CIFAR-10-C"
        if source == "cifar10c"
        else "corruptions made with torchvision and Pillow, not CIFAR-10-C"
    )
    caption = f"Accuracy under common corruptions by severity, averaged over them: {made}."
    return drawn("corruptions", caption, draw, rows, ("model", "corruption", "severity", "k", "n"), 6.4)
