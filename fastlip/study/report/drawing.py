"""How figures are drawn: their style, colours and helpers; SVG, with the numbers beside it as CSV."""

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


def draw_figure(
    results: Results,
    name: str,
    caption: str,
    draw: Callable[[Axes], None],
    rows: Rows,
    header: Sequence[str],
    width: float = 4.6,
) -> Figure:
    """A figure by ``draw``, which also fills ``rows``, with a legend of the arms; ``width`` in inches."""
    # One salt per figure: several drawings share a page, and their identifiers must not collide.
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


def line(axes: Axes, model: Model, x: ArrayLike, y: ArrayLike, dashes: str = "-", **style: Any) -> None:
    """A curve of one model in the colour of its arm; what the dashes mean is for the caption."""
    axes.plot(x, y, dashes, color=ARM_COLOURS[model["arm"]], **style)


def shares_upward(axes: Axes) -> None:
    """Per cent from 0 to 100 on the vertical axis."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def counts_across(axes: Axes) -> None:
    """Whole numbers on the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes, results: Results) -> None:
    """One entry for each arm, however many seeds and kinds of line it has."""
    seeds = len({m["seed"] for m in results["models"]})
    arms = dict.fromkeys(m["arm"] for m in results["models"])
    handles = [axes.plot([], [], color=ARM_COLOURS[arm])[0] for arm in arms]
    axes.legend(handles, [ARM_NAMES[arm] + (f", {seeds} seeds" if seeds > 1 else "") for arm in arms])


DASHES = {"pgd": "-", "gaussian": ":", "clean": "--"}
