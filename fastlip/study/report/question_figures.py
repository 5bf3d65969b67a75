"""Figures of the questions: paired differences (3), unstability and distortion (4), and transfer (1 and 2)."""

import math
import textwrap
from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from fastlip.study.report.arms import arm_name, arms_of
from fastlip.study.report.difference_table import MEASURES, Group, grouped
from fastlip.study.report.drawing import (
    HEAT,
    INK,
    MUTED,
    Figure,
    Rows,
    arms_downward,
    draw_figure,
    draw_interval,
    label,
    log_scale,
)
from fastlip.study.report.number_format import share
from fastlip.study.report.transfer_cells import transfer_cells
from fastlip.study.storage.schema import Estimate, Point, Results


def difference_figures(results: Results) -> list[Figure]:
    """Paired differences of each seed and over seeds: for question 3, and for questions 1 and 2."""
    rise = (
        "Question 3: smallest distortions and accuracies under PGD, paired on the same images. To the right of the "
        "line the first arm withstands more."
    )
    ratio = (
        "Questions 1 and 2: the ratio of smallest adversarial to smallest Gaussian distortion, and clean accuracy, "
        "paired on the same images. To the left of the line the first arm's adversarial perturbations are smaller "
        "beside noise than the second's."
    )
    figures = [
        _difference_figure(results, "differences", ("log smallest distortion", "relative accuracy under PGD"), rise),
        _difference_figure(results, "ratio-differences", ("log ratio", "clean accuracy"), ratio),
    ]
    return [figure for figure in figures if figure is not None]


def _difference_figure(results: Results, name: str, measures: tuple[str, ...], caption: str) -> Figure | None:
    panels = [[g for g in grouped(results) if g.measure == measure] for measure in measures]
    panels = [groups for groups in panels if groups]
    if not panels:
        return None
    rows: Rows = []
    arms = {arm.key: arm for arm in arms_of(results)}

    def draw(drawn: Any) -> None:
        for axes, groups in zip(drawn[:, 0], panels, strict=True):
            for y, group in enumerate(groups):
                arm, n = arms[group.arm], len(group.seeds)
                style = {"color": arm.colour, "marker": arm.marker}
                for i, c in enumerate(group.seeds):
                    place = y + (0.5 * i / (n - 1) - 0.35 if n > 1 else 0)
                    _interval(axes, place, c["difference"], group.logarithmic, markersize=4, **style)
                    rows.append(_row(group, c["seed"], c["difference"]))
                if group.overall is not None:
                    _interval(axes, y + 0.33, group.overall, group.logarithmic, color=INK, marker="D", markersize=5)
                    rows.append(_row(group, "all", group.overall))
            axes.axvline(1 if groups[0].logarithmic else 0, color=INK, linewidth=1)
            if groups[0].logarithmic:
                log_scale(axes, "x")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5))
            pairs = [f"{arm_name(results, g.arm)} against {arm_name(results, g.against)}" for g in groups]
            arms_downward(axes, pairs)
            axes.set_title(MEASURES[groups[0].measure])

    caption += " Arrows: no limit exists. Each seed with its interval over images" + (
        "; in black, below the seeds, all seeds together."
        if any(g.overall for groups in panels for g in groups)
        else "."
    )
    header = ("arm", "against", "measure", "seed", "difference", "low", "high", "n")
    heights = [0.5 + 0.5 * len(groups) for groups in panels]
    return draw_figure(
        results,
        name,
        caption,
        draw,
        rows,
        header,
        panels=(len(panels), 1),
        size=(5.6, sum(heights)),
        legend=False,
        share_axes=False,
        heights=heights,
    )


def _row(group: Group, seed: object, e: Estimate) -> tuple[object, ...]:
    return group.arm, group.against, group.measure, seed, e["value"], e["low"], e["high"], e["n"]


def _interval(axes: Any, y: float, estimate: Estimate, logarithmic: bool, **style: Any) -> None:
    """A point with its interval, as a factor where it is a logarithm."""
    sides = (estimate["value"], estimate["low"], estimate["high"])
    value, low, high = (math.exp(min(max(v, -300.0), 300.0)) if logarithmic and v is not None else v for v in sides)
    draw_interval(axes, y, value, low, high, **style)


#: The axes of question 4: key of a point, label.
_UNSTABILITY = {"log10_constant": "certified constant / margin", "log10_stretch": "largest stretch / margin"}

_COLUMNS = 5


def unstability_figures(results: Results) -> list[Figure]:
    """Unstability, free of scale, against distortion on the fixed images: a small panel for each arm."""
    return [figure for key in _UNSTABILITY if (figure := _unstability(results, key)) is not None]


def _unstability(results: Results, key: str) -> Figure | None:
    known: dict[str, list[tuple[Point, float, float]]] = {}
    rows: Rows = []
    for p in results["points"]:
        x, y = p[key], p["log10_distortion"]  # type: ignore[literal-required]
        rows.append((p["run"], "end" if p["epoch"] is None else p["epoch"], x, y, p["accuracy"]["value"]))
        if x is not None and y is not None:
            known.setdefault(p["arm"], []).append((p, x, 255 * 10 ** min(y, 300.0)))
    arms = [arm for arm in arms_of(results) if arm.key in known]
    if not arms:
        return None
    columns = min(len(arms), _COLUMNS)
    lines = math.ceil(len(arms) / columns)

    def draw(panels: Any) -> None:
        for axes, arm in zip(panels.flat, arms, strict=False):
            for name in dict.fromkeys(p["run"] for p, _, _ in known[arm.key]):
                path = [(p, x, y) for p, x, y in known[arm.key] if p["run"] == name]
                axes.plot([x for _, x, _ in path], [y for _, _, y in path], "-", color=arm.colour, lw=0.8, alpha=0.5)
                for p, x, y in path:
                    end = p["epoch"] is None
                    filled = arm.colour if end else "none"
                    axes.plot(x, y, arm.marker, color=arm.colour, markerfacecolor=filled, markersize=6 if end else 3.5)
            axes.set_title("\n".join(textwrap.wrap(arm.name, 20)[:2]), fontsize=8.5)
        for axes in panels.flat[len(arms) :]:
            axes.set_visible(False)
        log_scale(panels[0, 0], "y")
        for axes in panels[:, 0]:
            axes.set_ylabel("distortion × 255")
        for axes in panels.flat[max(0, len(arms) - columns) : len(arms)]:
            axes.xaxis.set_tick_params(labelbottom=True)
        panels[0, 0].figure.supxlabel(f"log10 of the {_UNSTABILITY[key]}", fontsize=10, color=INK)

    caption = (
        f"Question 4, arm by arm: {_UNSTABILITY[key]} (free of the scale of the logits) against the geometric mean of "
        "the smallest distortions on the same fixed images. Filled: models at the end of training; open: snapshots on "
        "the way, joined in order."
    )
    name = "unstability-certified" if key == "log10_constant" else "unstability-observed"
    header = ("run", "epoch", key, "log10_distortion", "accuracy")
    size = (max(3.2, 1.75 * columns), 1.9 * lines + 0.4)
    return draw_figure(results, name, caption, draw, rows, header, panels=(lines, columns), size=size, legend=False)


def transfer_figure(results: Results) -> Figure | None:
    """Transfer as a heat map: made for (rows), judged by (columns); None where it was not measured."""
    if not results["transfer"]:
        return None
    cells = transfer_cells(results)
    rows: Rows = [
        (t["source"], t["target"], t["strength"], t["disjoint"], t["fooled"]["value"], t["noise"]["value"])
        for t in results["transfer"]
    ]
    n = len(cells.names)

    def draw(panels: Any) -> None:
        for axes, strength in zip(panels[0], cells.strengths, strict=True):
            for y, source in enumerate(cells.names):
                for x, target in enumerate(cells.names):
                    cell = cells.at(strength, source, target)
                    fooled = None if cell is None else cell.fooled
                    depth = 0.0 if fooled is None else 0.85 * fooled
                    axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=HEAT, alpha=depth, linewidth=0))
                    mark = "†" if cell is not None and cell.disjoint else ""
                    axes.text(x, y - 0.1, f"{share(fooled)}{mark}", ha="center", va="center", fontsize=8)
                    noise = "" if cell is None else share(cell.noise)
                    axes.text(x, y + 0.28, noise, ha="center", va="center", fontsize=6.5, color=INK)
            axes.set_xlim(-0.5, n - 0.5)
            axes.set_xticks(range(n), list(map(label, cells.names)), rotation=90)
            arms_downward(axes, cells.names)
            axes.set_ylim(n - 0.5, -0.5)
            axes.tick_params(axis="x", labelcolor=INK, length=0)
            axes.grid(visible=False)
            axes.set_title(f"L2 norm {strength:g}")
            axes.set_xlabel("judged by", color=MUTED)
        panels[0, 0].set_ylabel("made for", color=MUTED)

    caption = (
        "Transfer of adversarial examples: share of images that the judge gets wrong under perturbations made for the "
        "model of the row, all scaled to one L2 norm (pixels in [0, 1]); small below it, under Gaussian noise of that "
        f"norm.{cells.note} † trained on disjoint images."
    )
    header = ("source", "target", "l2", "disjoint", "fooled", "noise")
    size = (1.9 + 0.52 * n * len(cells.strengths), 2.0 + 0.42 * n)
    return draw_figure(
        results,
        "transfer",
        caption,
        draw,
        rows,
        header,
        panels=(1, len(cells.strengths)),
        size=size,
        legend=False,
    )
