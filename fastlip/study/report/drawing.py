"""Drawing of figures: style, colours and helpers. A figure is an SVG with its data as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from fastlip.study.report.arms import ARM_COLOURS, ARM_NAMES
from fastlip.study.storage.files import write_text
from fastlip.study.storage.schema import Model, Results

INK, MUTED, GRID = "#1f2328", "#656d76", "#d0d7de"

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
        caption: describes the figure, also for readers who cannot see it.
        svg: the drawing.
        csv: the numbers that are drawn.
    """

    name: str
    caption: str
    svg: str
    csv: str


def write(folder: Path, figures: list[Figure]) -> None:
    for figure in figures:
        write_text(folder / f"{figure.name}.svg", figure.svg)
        write_text(folder / f"{figure.name}.csv", figure.csv)


def draw_figure(
    results: Results,
    name: str,
    caption: str,
    draw: Callable[[Axes], None],
    rows: Rows,
    header: Sequence[str],
    width: float = 4.6,
) -> Figure:
    """Draw a figure with a legend of the arms.

    Args:
        results: of the run.
        name: of the figure's files.
        caption: of the figure.
        draw: draws on the axes and appends the data to ``rows``.
        rows: the list that ``draw`` appends to.
        header: names of the columns of ``rows``.
        width: in inches.
    """
    # Figures share a page, and identifiers in their SVG must not collide: each has a salt of its own.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(width, 3.2), layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        _legend(axes, results)
        svg = io.StringIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return Figure(name, caption, svg.getvalue(), table.getvalue())


def inline(figure: Figure) -> str:
    """The SVG for an HTML page, with CSS variables for colours, without metadata and URLs."""
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


def line(axes: Axes, model: Model, x: ArrayLike, y: ArrayLike, dashes: str = "-", **style: Any) -> None:
    """A curve of one model in the colour of its arm; the caption explains the dashes."""
    axes.plot(x, y, dashes, color=ARM_COLOURS[model["arm"]], **style)


def shares_upward(axes: Axes) -> None:
    """Set the vertical axis to per cent from 0 to 100."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def counts_across(axes: Axes) -> None:
    """Set the ticks of the horizontal axis to whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes, results: Results) -> None:
    """A legend with one entry for each arm, however many curves the arm has."""
    seeds = len({m["seed"] for m in results["models"]})
    arms = dict.fromkeys(m["arm"] for m in results["models"])
    handles = [axes.plot([], [], color=ARM_COLOURS[arm])[0] for arm in arms]
    axes.legend(handles, [ARM_NAMES[arm] + (f", {seeds} seeds" if seeds > 1 else "") for arm in arms])


DASHES = {"pgd": "-", "gaussian": ":", "clean": "--"}
