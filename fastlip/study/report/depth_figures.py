"""Figures by depth: norms of layers, observed stretch, and the growth of perturbations."""

import re
from typing import Any

import numpy as np

from fastlip.study.report.arms import Arm, arms_of, several_seeds
from fastlip.study.report.drawing import (
    Figure,
    Rows,
    band_in_words,
    curves,
    depth_shares,
    draw_figure,
    log_scale,
    unit_across,
)
from fastlip.study.storage.schema import Results

_DEPTH = "depth, input to logits"


def layer_figure(results: Results) -> Figure:
    """Certified operator norms by kind of layer."""
    rows: Rows = []
    arms = arms_of(results)
    kinds = sorted({operator(layer["kind"]) for m in results["models"] for layer in m["lipschitz"]["layers"]})

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        width = 0.8 / max(len(arms), 1)
        for i, arm in enumerate(arms):
            norms: dict[str, list[float]] = {}
            kind_of = {}
            for m in arm.models:
                for depth, layer in enumerate(m["lipschitz"]["layers"], 1):
                    norms.setdefault(layer["name"], []).append(layer["upper"])
                    kind_of[layer["name"]] = operator(layer["kind"])
                    rows.append((m["name"], depth, layer["name"], layer["kind"], layer["lower"], layer["upper"]))
            for k, kind in enumerate(kinds):
                upper = [float(np.mean(v)) for name, v in norms.items() if kind_of[name] == kind]
                left = k - 0.4 + i * width
                # Within an arm's part of the column, depth grows to the right.
                x = left + width * (0.1 + 0.8 * np.arange(len(upper)) / max(len(upper) - 1, 1))
                axes.plot(x, upper, arm.marker, color=arm.colour, markersize=3, markeredgewidth=0, alpha=0.85)
        axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 1) for kind in kinds])
        axes.set_xlim(-0.5, max(len(kinds), 1) - 0.5)
        log_scale(axes, "y")
        axes.set_ylabel("L2 operator norm (logarithmic)")

    caption = (
        "Certified operator norm of each layer as the network applies it, BatchNorm folded in: upper sides, by kind of "
        "layer; within an arm's part of a column, deeper layers stand further right."
    )
    caption += " Points: means over seeds." if several_seeds(results) else ""
    header = ("model", "depth", "layer", "kind", "lower", "upper")
    return draw_figure(results, "layer-norms", caption, draw, rows, header, size=(6.0, 3.0))


def operator(kind: str) -> str:
    """The kind of layer in a description such as "Conv2d 64→64 3×3 on 8×8 + BN": its type and its kernel."""
    words = kind.split()
    kernel = words[2] if len(words) > 2 and re.fullmatch(r"\d+(×\d+)+", words[2]) else ""
    return f"{words[0]} {kernel}".strip() if words else ""


def stretch_figure(results: Results) -> Figure:
    """Observed stretch of the smallest perturbations from the input to each depth."""
    rows: Rows = []

    def draw(panels: Any) -> None:
        for axes, key, title in zip(panels[0], ("smallest_pgd", "smallest_gaussian"), _PERTURBED, strict=True):
            for arm in arms_of(results):
                values = []
                for m in arm.models:
                    smallest: Any = m[key]  # type: ignore[literal-required]
                    depth, logits = smallest["depth"], smallest["stretch"]
                    if (not depth["mean"] and m["depth_points"]) or logits["mean"]["value"] is None:
                        continue
                    mean = [*depth["mean"], logits["mean"]["value"]]
                    largest = [*depth["largest"], logits["largest"]]
                    points = [*m["depth_points"], "logits"]
                    rows.extend(
                        (m["name"], smallest["attack"], p, v, top)
                        for p, v, top in zip(points, mean, largest, strict=True)
                    )
                    values.append(mean)
                _along(axes, arm, values)
            axes.set_title(title)
            axes.set_xlabel(_DEPTH)
            unit_across(axes)
        log_scale(panels[0, 0], "y")
        panels[0, 0].set_ylabel("mean stretch ‖φ(x′)−φ(x)‖ / ‖x′−x‖")

    caption = f"Observed stretch of the smallest perturbations from the input up to each depth.{band_in_words(results)}"
    header = ("model", "perturbation", "after", "mean", "largest")
    return draw_figure(results, "observed-stretch", caption, draw, rows, header, panels=(1, 2))


_PERTURBED = ("smallest PGD", "smallest Gaussian noise")


def growth_figure(results: Results) -> Figure:
    """Relative change of the features by stage."""
    rows: Rows = []

    def draw(panels: Any) -> None:
        for axes, condition, title in zip(
            panels[0], ("pgd", "gaussian"), ("PGD at L∞", "noise of the same norm"), strict=True
        ):
            for arm in arms_of(results):
                values = []
                for m in arm.models:
                    chosen = [g for g in m["growth"] if g["condition"] == condition]
                    rows.extend(
                        (m["name"], condition, g["stage"], *(g["relative"][side] for side in ("value", "low", "high")))
                        for g in chosen
                    )
                    values.append([g["relative"]["value"] for g in chosen])
                _along(axes, arm, values)
            axes.set_title(title)
            axes.set_xlabel(_DEPTH)
            unit_across(axes)
        log_scale(panels[0, 0], "y")
        panels[0, 0].set_ylabel("‖φ(x′)−φ(x)‖ / ‖φ(x)‖")

    caption = (
        "How a perturbation grows with depth: change of the features relative to the clean ones at each stage, "
        f"averaged over the images that PGD moved.{band_in_words(results)}"
    )
    header = ("model", "perturbation", "stage", "mean", "low", "high")
    return draw_figure(results, "growth", caption, draw, rows, header, panels=(1, 2))


def _along(axes: Any, arm: Arm, values: list[list[Any]]) -> None:
    """Curves over the depth of the network; none where the runs have not the same depth."""
    if values and len({len(v) for v in values}) == 1 and values[0]:
        curves(axes, arm, depth_shares(len(values[0])), values, marker=arm.marker, markersize=3)
