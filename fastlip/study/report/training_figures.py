"""Figures along training: accuracy, and the trajectories that question 4 correlates."""

from matplotlib.axes import Axes

from fastlip.study.report.drawing import Figure, Rows, counts_across, draw_figure, line, shares_upward
from fastlip.study.storage.schema import Results


def training_figure(results: Results) -> Figure:
    """Training accuracy by epoch."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            if model["training"] is None:
                continue
            accuracy = model["training"]["accuracy"]
            epochs = range(1, len(accuracy) + 1)
            line(axes, model, epochs, accuracy, marker="o")
            rows.extend(
                (model["name"], e, a, loss)
                for e, a, loss in zip(epochs, accuracy, model["training"]["loss"], strict=True)
            )
        shares_upward(axes)
        counts_across(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy, augmented training images")

    return draw_figure(
        results, "training", "Accuracy during training.", draw, rows, ("model", "epoch", "accuracy", "loss")
    )


def trajectory_figure(results: Results) -> Figure:
    """Certified constant against median smallest distortion during training, which question 4 correlates."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            chosen = [p for p in results["points"] if p["run"] == model["name"] and p["log10_distortion"] is not None]
            x = [p["log10_upper"] for p in chosen]
            y = [p["log10_distortion"] for p in chosen]
            line(axes, model, x, y, marker="o", markersize=4, linewidth=1)
            line(axes, model, x[-1:], y[-1:], "s", markersize=8)
        rows.extend(
            (
                p["run"],
                p["epoch"] or "end",
                p["log10_upper"],
                p["log10_stretch"],
                p["log10_distortion"],
                p["accuracy"]["value"],
            )
            for p in results["points"]
        )
        axes.set_xlabel("log10 of the certified upper Lipschitz constant")
        axes.set_ylabel("median smallest distortion (× 255)")

    caption = "What question 4 correlates: every training run with its snapshots in order; squares mark the end."
    header = ("run", "epoch", "log10_upper", "largest_stretch", "median_distortion", "accuracy")
    return draw_figure(results, "trajectory", caption, draw, rows, header)
