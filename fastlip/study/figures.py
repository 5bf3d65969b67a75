"""Figures of a run as SVG, each with the numbers it draws beside it as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastlip.study.files import write_text
from fastlip.study.schema import Attack, Model, Results
from fastlip.study.tables import ARM_NAMES

INK, MUTED, GRID = "#1f2328", "#656d76", "#d0d7de"
#: Colours of the arms, told apart by the colour-blind and on white and black; the report swaps them in dark mode.
ARM_COLOURS = {
    "scratch": "#c2510a",
    "finetune": "#0a5cc2",
    "linear": "#8a3fb0",
    "partial": "#0b7d78",
    "lpft": "#b0216b",
    "reference": "#5c7a12",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

Rows = list[tuple[object, ...]]


@dataclass(frozen=True)
class Figure:
    """One drawing with its data.

    Attributes:
        name: stem of its files.
        caption: what it shows, for a reader who cannot see it too.
        svg: the drawing.
        csv: the numbers in it.
    """

    name: str
    caption: str
    svg: str
    csv: str


def write(folder: Path, figures: list[Figure]) -> None:
    for figure in figures:
        write_text(folder / f"{figure.name}.svg", figure.svg)
        write_text(folder / f"{figure.name}.csv", figure.csv)


def accuracy_figures(results: Results) -> list[Figure]:
    """Accuracy by strength: PGD in each norm, with the noise of the same norm as its control, and Gaussian noise."""
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
    """Share of images whose decision is changed by a distortion of at most x.

    Args:
        results: of the run.
        distortions: for each model's name "pgd" and "gaussian", [N] in [0, 1], inf where none was found.
    """
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            for kind, dashes, what in (("pgd", "-", "PGD"), ("gaussian", ":", "Gaussian")):
                values = np.sort(distortions[model["name"]][kind]) * 255
                shares = np.arange(1, len(values) + 1) / max(len(values), 1)
                found = np.isfinite(values) & (values > 0)
                axes.step(
                    values[found],
                    shares[found],
                    dashes,
                    where="post",
                    color=ARM_COLOURS[model["arm"]],
                    label=f"{label_of(results, model)}, {what}",
                )
                rows.extend((model["name"], kind, float(v), float(s)) for v, s in zip(values, shares, strict=True))
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("smallest distortion that changes the decision (× 255)")
        axes.set_ylabel("share of images")
        legend(axes)

    caption = (
        "Share of correctly classified images whose decision changes at a distortion of at most x. Solid: the smallest "
        "perturbation found by PGD; dotted: the smallest Gaussian noise found. A curve that ends below 100% marks "
        "images on which nothing was found."
    )
    return drawn("smallest-distortion", caption, draw, rows, ("model", "perturbation", "distortion_x255", "share"), 6.4)


def layer_figure(results: Results) -> Figure:
    """Certified operator norms by depth."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            layers = model["lipschitz"]["layers"]
            depth = np.arange(1, len(layers) + 1)
            lower, upper = (np.array([layer[side] for layer in layers]) for side in ("lower", "upper"))
            colour = ARM_COLOURS[model["arm"]]
            axes.plot(
                depth, upper, color=colour, linewidth=1.2, marker="o", markersize=3, label=label_of(results, model)
            )
            axes.vlines(depth, lower, upper, color=colour, linewidth=3, alpha=0.4)
            rows.extend(
                (model["name"], int(d), layer["name"], layer["kind"], layer["lower"], layer["upper"])
                for d, layer in zip(depth, layers, strict=True)
            )
        axes.set_yscale("log")
        axes.set_xlabel("layer, in order of execution")
        axes.set_ylabel("L2 operator norm, BatchNorm folded")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)

    caption = (
        "Certified operator norm of each layer as the network applies it, BatchNorm folded in. Points: upper sides; "
        "bars down to the lower sides, mostly narrower than the points."
    )
    return drawn("layer-norms", caption, draw, rows, ("model", "depth", "layer", "kind", "lower", "upper"), 5.4)


def training_figure(results: Results) -> Figure:
    """Training accuracy by epoch."""
    rows: Rows = []

    def draw(axes: Axes) -> None:
        for model in results["models"]:
            accuracy = model["training"]["accuracy"]
            epochs = range(1, len(accuracy) + 1)
            axes.plot(epochs, accuracy, color=ARM_COLOURS[model["arm"]], marker="o", label=label_of(results, model))
            rows.extend(
                (model["name"], e, a, loss)
                for e, a, loss in zip(epochs, accuracy, model["training"]["loss"], strict=True)
            )
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy, augmented training images")
        legend(axes)

    return drawn("training", "Accuracy during training.", draw, rows, ("model", "epoch", "accuracy", "loss"), 5.4)


def inline(figure: Figure) -> str:
    """The drawing for an HTML page: colours as CSS variables, no metadata, nothing that names an address."""
    svg = figure.svg[figure.svg.index("<svg") :]
    start, end = svg.find("<metadata>"), svg.find("</metadata>")
    if start >= 0:
        svg = svg[:start] + svg[end + len("</metadata>") :]
    head, _, body = svg.partition(">")
    view = head[head.index('viewBox="') :].split('"')[1]
    svg = f'<svg viewBox="{view}" role="img" aria-label="{figure.caption}">{body}'
    svg = svg.replace("xlink:href", "href").replace("*{stroke-linejoin: round; stroke-linecap: butt}", "")
    names = {INK: "ink", MUTED: "muted", GRID: "grid"} | {colour: arm for arm, colour in ARM_COLOURS.items()}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _accuracy(
    results: Results, name: str, title: str, label: str, chosen: Callable[[Attack], bool], scale: float
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
            colour = ARM_COLOURS[model["arm"]]
            axes.fill_between(x, [r["low"] for r in rates], [r["high"] for r in rates], color=colour, alpha=0.16, lw=0)
            axes.plot(x, value, color=colour, marker="o", markersize=4, label=label_of(results, model))
            noise = [model["attacked_clean"], *(a["noise_accuracy"] for a in attacks)]
            kept = [None if r is None else r["value"] for r in noise]
            if None not in kept[1:]:
                axes.plot(x, np.array(kept, dtype=float), ":", color=colour, linewidth=1.2)
            rows.extend(
                (model["name"], v, r["k"], r["n"], r["value"], r["low"], r["high"], control)
                for v, r, control in zip(strengths, rates, kept, strict=True)
            )
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(title)
        axes.set_xlabel(label)
        legend(axes)

    n = results["models"][0]["attacked_clean"]["n"]
    caption = (
        f"{title}: accuracy by strength on {n} images, with 95% Clopper–Pearson bands. Strengths are not to scale."
    )
    if name != "accuracy-gaussian":
        caption += " Dotted: the control, Gaussian noise of the L2 norm that PGD used on each image."
    header = ("model", "strength", "k", "n", "accuracy", "low", "high", "accuracy_under_noise_of_same_norm")
    return drawn(name, caption, draw, rows, header, 4.2)


def drawn(
    name: str, caption: str, draw: Callable[[Axes], None], rows: Rows, header: Sequence[str], width: float
) -> Figure:
    """A figure by ``draw``, which also fills ``rows``; ``width`` in inches."""
    # One salt per figure: several drawings share a page, and their identifiers must not collide.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(width, 3.4), layout="constrained")
        draw(canvas.add_subplot())
        svg = io.StringIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return Figure(name, caption, svg.getvalue(), table.getvalue())


def legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def label_of(results: Results, model: Model) -> str:
    seeds = {m["seed"] for m in results["models"]}
    name = ARM_NAMES[model["arm"]]
    return name if len(seeds) == 1 else f"{name}, seed {model['seed']}"
