"""Figures of robustness: smallest distortions and their ratios, accuracy under attacks, noise and corruptions."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fastlip.study.report.arms import arms_of, several_seeds
from fastlip.study.report.attack_tables import corruption_source
from fastlip.study.report.drawing import (
    INK,
    MUTED,
    Figure,
    Rows,
    arms_downward,
    band_in_words,
    curves,
    draw_figure,
    draw_interval,
    log_scale,
    shares_upward,
)
from fastlip.study.storage.schema import AttackSummary, Results

#: Points of the curves in the figure of smallest distortions.
_POINTS = 120


def distortion_figure(results: Results, distortions: dict[str, dict[str, np.ndarray]]) -> Figure:
    """The proportion of images whose decision changes at a distortion of at most x.

    Args:
        results: of the run.
        distortions: the smallest distortions by name of the model and "pgd" or "gaussian", [N] in [0, 1]; inf where
            none was found.
    """
    rows: Rows = []
    every = np.concatenate([np.zeros(0), *(v for kinds in distortions.values() for v in kinds.values())]) * 255
    found = every[np.isfinite(every) & (every > 0)]
    low, high = (found.min(), found.max()) if len(found) else (0.1, 100.0)
    grid = np.geomspace(low * 0.9, high * 1.1, _POINTS)

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        for arm in arms_of(results):
            for kind in ("pgd", "gaussian"):
                values = [np.sort(distortions[m["name"]][kind]) * 255 for m in arm.models]
                shares = [np.searchsorted(v, grid, side="right") / max(len(v), 1) for v in values]
                curves(axes, arm, grid, shares, drawstyle="steps-post")
                for m, v in zip(arm.models, values, strict=True):
                    rows.extend((m["name"], kind, float(d), (i + 1) / len(v)) for i, d in enumerate(v))
        log_scale(axes, "x")
        shares_upward(axes)
        axes.set_xlabel("smallest distortion that changes the decision, × 255")
        axes.set_ylabel("share of images")
        for kind, label in (("pgd", "PGD"), ("gaussian", "Gaussian noise")):
            middle = np.concatenate([np.zeros(0), *(kinds[kind] for kinds in distortions.values())]) * 255
            middle = middle[np.isfinite(middle) & (middle > 0)]
            if len(middle):
                at = (float(np.median(middle)), 1.02)
                axes.annotate(label, at, (0, 2), textcoords="offset points", ha="center", weight="bold", color=INK)

    caption = (
        "Share of correctly classified images whose decision changes at a distortion of at most x. Curves on the left: "
        "the smallest perturbations found by PGD; on the right: the smallest Gaussian noise found. A curve that ends "
        f"below 100% marks images on which nothing was found.{band_in_words(results)}"
    )
    header = ("model", "perturbation", "distortion_x255", "share")
    return draw_figure(results, "smallest-distortion", caption, draw, rows, header, size=(5.2, 3.3))


def ratio_figure(results: Results) -> Figure:
    """Median ratio of smallest adversarial to smallest Gaussian distortion, beside that of a flat boundary."""
    rows: Rows = []
    arms = arms_of(results)

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        for y, arm in enumerate(arms):
            several = len(arm.models) > 1
            places = y + (np.linspace(-0.25, 0.25, len(arm.models)) if several else np.zeros(1))
            known = []
            for place, m in zip(places, arm.models, strict=True):
                ratio, flat = m["ratio_median"], m["flat_boundary"]["ratio"]
                rows.append((m["name"], m["role"], ratio["value"], ratio["low"], ratio["high"], flat))
                if flat > 0:
                    axes.plot([flat, flat], [y - 0.42, y + 0.42], color=INK, linestyle=(0, (2, 1.2)), linewidth=1.4)
                if ratio["value"] is not None:
                    known.append(ratio["value"])
                # A ratio is 0 where noise of no strength changed the decision; a logarithmic axis has no place for it.
                value, low, high = (ratio[side] or None for side in ("value", "low", "high"))
                size = 3.5 if several else 7
                draw_interval(axes, place, value, low, high, color=arm.colour, marker=arm.marker, markersize=size)
            if several and len(known) == len(arm.models) and min(known) > 0:
                axes.plot(np.mean(known), y, "|", color=INK, markersize=18, markeredgewidth=2)
        log_scale(axes, "x")
        flat = arms[0].models[0]["flat_boundary"]["ratio"]
        if flat > 0:
            axes.annotate("flat boundary", (flat, -0.45), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        names = [f"{arm.name}{' (reference)' if arm.models[0]['role'] == 'reference' else ''}" for arm in arms]
        arms_downward(axes, names)
        axes.set_xlabel("median ratio PGD / Gaussian (logarithmic)")

    caption = (
        "How many times smaller the smallest adversarial perturbation is than the smallest noise: median of the ratio "
        "over correctly classified images, with its interval. Dashed: the ratio that geometry alone predicts for a "
        "flat boundary with as many pixels and noise directions (Fawzi et al. 2016). Arrows: no limit exists; dash: no "
        "such ratio, or 0, since no noise was found that changes most decisions."
    )
    caption += " Bars: means over seeds." if several_seeds(results) else ""
    header = ("model", "role", "ratio_median", "low", "high", "flat_boundary")
    size = (5.2, 0.8 + 0.36 * len(arms))
    return draw_figure(results, "ratios", caption, draw, rows, header, size=size, legend=False)


def corruption_figure(results: Results) -> Figure:
    """Accuracy by severity, averaged over corruptions."""
    rows: Rows = []

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        for arm in arms_of(results):
            found = [m["corruptions"]["rows"] for m in arm.models]
            severities = sorted({c["severity"] for c in found[0]})
            values = [
                [_mean([c["accuracy"]["value"] for c in some if c["severity"] == s]) for s in severities]
                for some in found
            ]
            curves(axes, arm, severities, values, marker=arm.marker, markersize=4)
            rows.extend(
                (m["name"], c["corruption"], c["severity"], c["accuracy"]["k"], c["accuracy"]["n"])
                for m, some in zip(arm.models, found, strict=True)
                for c in some
            )
        shares_upward(axes)
        axes.set_xticks(range(1, 6))
        axes.set_xlim(0.7, 5.3)
        axes.set_xlabel("severity")
        axes.set_ylabel("accuracy, mean over corruptions")

    caption = (
        f"Accuracy under common corruptions by severity, averaged over them ({corruption_source(results)})."
        f"{band_in_words(results)}"
    )
    return draw_figure(results, "corruptions", caption, draw, rows, ("model", "corruption", "severity", "k", "n"))


def corruption_distortion_figure(results: Results) -> Figure:
    """Average distortion of each corruption at each severity, beside the smallest perturbations of each arm."""
    rows: Rows = []
    found = results["models"][0]["corruptions"]["rows"]
    names = list(dict.fromkeys(c["corruption"] for c in found))

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        for y, name in enumerate(names):
            chosen = sorted((c for c in found if c["corruption"] == name), key=lambda c: c["severity"])
            known = [(c["severity"], c["distortion"]["value"]) for c in chosen]
            shown = [(s, v * 255) for s, v in known if v is not None and v > 0]
            axes.plot([v for _, v in shown], [y] * len(shown), "-", color=MUTED, linewidth=1)
            for severity, value in shown:
                axes.plot(value, y, "o", color=MUTED, markersize=3)
                axes.annotate(str(severity), (value, y), (0, 3), textcoords="offset points", ha="center", fontsize=7)
            rows.extend((name, s, None if v is None else v * 255) for s, v in known)
        for arm in arms_of(results):
            for kind in ("PGD", "Gaussian"):
                medians = [
                    (m["smallest_pgd"] if kind == "PGD" else m["smallest_gaussian"])["median"]["value"]
                    for m in arm.models
                ]
                at = _mean(medians) * 255
                if at > 0:
                    axes.axvline(at, color=arm.colour, linestyle=arm.dashes, linewidth=1.4)
                    rows.append((f"smallest {kind}, {arm.key}", "", at))
        log_scale(axes, "x")
        arms_downward(axes, [name.replace("_", " ") for name in names])
        axes.set_xlabel("average distortion (× 255, logarithmic)")

    caption = (
        "Average distortion of common corruptions at each severity (numbers), beside the median smallest perturbations "
        "of each arm (vertical lines): on the left those by PGD, on the right Gaussian noise."
    )
    size = (5.2, 0.9 + 0.26 * len(names))
    return draw_figure(
        results,
        "corruption-distortion",
        caption,
        draw,
        rows,
        ("perturbation", "severity", "distortion_x255"),
        size=size,
    )


def accuracy_figures(results: Results) -> list[Figure]:
    """Accuracy by strength: PGD in each norm, with noise of the same norm as the control, and Gaussian noise."""
    drawings = [
        _accuracy(results, "accuracy-linf", "PGD, L∞", "radius ε in 255ths", lambda a: a["norm"] == "linf", 255.0),
        _accuracy(results, "accuracy-l2", "PGD, L2", "radius ε, pixels in [0, 1]", lambda a: a["norm"] == "l2", 1.0),
        _accuracy(results, "accuracy-l1", "PGD, L1", "radius ε, pixels in [0, 1]", lambda a: a["norm"] == "l1", 1.0),
        _accuracy(results, "accuracy-gaussian", "Gaussian noise", "σ × 255", lambda a: a["norm"] is None, 255.0),
    ]
    return [figure for figure in drawings if figure.csv.count("\n") > 1 + len(results["models"])]


def _accuracy(
    results: Results, name: str, title: str, label: str, chosen: Callable[[AttackSummary], bool], scale: float
) -> Figure:
    rows: Rows = []

    def draw(panels: Any) -> None:
        axes: Axes = panels[0, 0]
        ticks = ["0"]
        for arm in arms_of(results):
            values: list[Any] = []
            kept: list[Any] = []
            limits: Any = None
            for model in arm.models:
                attacks = sorted((a for a in model["attacks"] if chosen(a)), key=lambda a: a["strength"])
                rates = [model["attacked_clean"], *(a["accuracy"] for a in attacks)]
                noise = [model["attacked_clean"], *(a["noise_accuracy"] for a in attacks)]
                strengths = [0.0, *(a["strength"] * scale for a in attacks)]
                ticks = [f"{v:.4g}" for v in strengths]
                values.append([r["value"] for r in rates])
                kept.append([None if r is None else r["value"] for r in noise])
                limits = [[r["low"] for r in rates], [r["high"] for r in rates]]
                rows.extend(
                    (model["name"], v, r["k"], r["n"], r["value"], r["low"], r["high"], control)
                    for v, r, control in zip(strengths, rates, kept[-1], strict=True)
                )
            x = range(len(ticks))
            curves(axes, arm, x, values, limits if banded else None, marker=arm.marker, markersize=4)
            if name != "accuracy-gaussian":
                axes.plot(x, np.array(kept, dtype=float).mean(0), color=arm.colour, dashes=(1, 1), linewidth=0.9)
        axes.set_xticks(range(len(ticks)), ticks)
        shares_upward(axes)
        axes.set_title(title)
        axes.set_xlabel(label)

    # Of many arms bands would hide the curves.
    banded = len(arms_of(results)) <= 4
    clean = results["models"][0]["attacked_clean"]
    how = f", with {100 * clean['confidence']:g}% Clopper–Pearson bands" if banded else ""
    how = ", means over seeds and their range" if several_seeds(results) else how
    caption = f"{title}: accuracy by strength on {clean['n']} images{how}. Strengths are not to scale."
    if name != "accuracy-gaussian":
        caption += " Thin and dotted: the control, Gaussian noise of the L2 norm that PGD used on each image."
    header = ("model", "strength", "k", "n", "accuracy", "low", "high", "accuracy_under_noise_of_same_norm")
    return draw_figure(results, name, caption, draw, rows, header, size=(4.2, 2.9))


def _mean(values: list[float | None]) -> float:
    """The mean; NaN where there are no values or one is missing."""
    return float(np.mean(np.array(values, dtype=float))) if values else float("nan")
