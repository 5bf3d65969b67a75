"""Figures of spectra: ranks of features, distances and singular values of weights."""

from typing import Any

import numpy as np

from fastlip.study.report.arms import arms_of
from fastlip.study.report.depth_figures import operator
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
from fastlip.study.storage.schema import Model, Results, WeightSpectrum


def rank_figure(results: Results) -> Figure:
    """Effective rank of the features by stage."""
    rows: Rows = []

    def draw(panels: Any) -> None:
        for axes, condition, title in zip(panels[0], ("clean", "pgd"), ("clean", "under PGD at L∞"), strict=True):
            for arm in arms_of(results):
                chosen = [[f for f in m["features"] if f["condition"] == condition] for m in arm.models]
                values = [[f["effective_rank"] for f in some] for some in chosen]
                if values[0] and len({len(v) for v in values}) == 1:
                    curves(axes, arm, depth_shares(len(values[0])), values, marker=arm.marker, markersize=3)
            axes.set_title(title)
            axes.set_xlabel("depth, stem to logits")
            unit_across(axes)
        panels[0, 0].set_ylim(bottom=0)
        panels[0, 0].set_ylabel("effective rank of the features")
        rows.extend(
            (m["name"], f["condition"], f["stage"], f["effective_rank"], f["stable_rank"], f["largest"])
            for m in results["models"]
            for f in m["features"]
        )

    caption = (
        "Effective rank (exponential of the entropy of the singular values) of each stage's features over images and "
        "positions. It cannot exceed the number of channels, or of images where maps are 1×1."
        f"{band_in_words(results)}"
    )
    header = ("model", "condition", "stage", "effective_rank", "stable_rank", "largest")
    return draw_figure(results, "feature-rank", caption, draw, rows, header, panels=(1, 2))


def weight_figure(results: Results) -> Figure:
    """Relative distance of each weight from its value at the beginning of training."""
    rows: Rows = []
    header = ("model", "depth", "layer", "distance", "rank", "stable_rank", "effective_rank", "dead_taps")

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        for arm in arms_of(results):
            # A logarithmic axis has no place for weights that did not move.
            values = [[w["distance"] or np.nan for w in m["weights"]] for m in arm.models]
            if values[0] and len({len(v) for v in values}) == 1:
                x = depth_shares(len(values[0]))
                curves(axes, arm, x, values, linewidth=1.2, marker=arm.marker, markersize=2.5)
            rows.extend(
                (m["name"], d, w["layer"], *(w[key] for key in header[3:]))  # type: ignore[literal-required]
                for m in arm.models
                for d, w in enumerate(m["weights"], 1)
            )
        log_scale(axes, "y")
        axes.set_xlabel("depth, from the first layer to the last")
        axes.set_ylabel("‖W−W₀‖ / ‖W₀‖ (logarithmic)")

    caption = (
        "Distance of each weight from where training began: the source's weights for transfer arms, their own random "
        f"ones for the others. Weights that did not move have no point.{band_in_words(results)}"
    )
    dead = max((w["dead_taps"] for m in results["models"] for w in m["weights"]), default=0.0)
    if dead > 0:
        caption += (
            f" SOME TAPS ARE DEAD: up to {dead:.0%} of a kernel lie beyond the image at every position, so that "
            "nothing was learned there. They are left out; a stem that reduces images less has fewer of them."
        )
    return draw_figure(results, "weight-distance", caption, draw, rows, header)


def profile_figure(results: Results) -> Figure:
    """Singular values of the first and the last convolution of each network, or its first and last weight."""
    rows: Rows = []

    def draw(panels: Any) -> None:
        for end, axes in enumerate(panels[0]):
            for arm in arms_of(results):
                chosen = [ends[end] for m in arm.models if (ends := _first_and_last(m))]
                if chosen:
                    curves(axes, arm, np.linspace(0, 1, 11), [w["profile"] for w in chosen])
                rows.extend(
                    (m["name"], ends[end]["layer"], i / 10, v)
                    for m in arm.models
                    if (ends := _first_and_last(m))
                    for i, v in enumerate(ends[end]["profile"])
                )
            axes.set_title(("first", "last")[end])
            axes.set_xlabel("rank, as a share of all")
            unit_across(axes)
        panels[0, 0].set_ylim(0, 1.02)
        panels[0, 0].set_ylabel("singular value / largest")

    caption = (
        "Singular values of the first and the last convolution with a kernel larger than 1 (the first and the last "
        f"weight of a network without), flattened to [outputs, inputs × kernel].{band_in_words(results)}"
    )
    header = ("model", "layer", "rank", "value")
    return draw_figure(results, "weight-profiles", caption, draw, rows, header, panels=(1, 2))


def _first_and_last(model: Model) -> tuple[WeightSpectrum, WeightSpectrum] | None:
    """The first and the last weight that mixes pixels; of all weights where none is known to; None without weights."""
    kernels = {layer["name"]: operator(layer["kind"]).partition(" ")[2] for layer in model["lipschitz"]["layers"]}
    wide = [w for w in model["weights"] if set(kernels.get(w["layer"], "").split("×")) - {"", "1"}]
    chosen = wide or model["weights"]
    return (chosen[0], chosen[-1]) if chosen else None
