"""Drawing of figures: style, colours and helpers. A figure is an SVG with its data as CSV."""

import csv
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from numpy.typing import ArrayLike

from fastlip.study.report.arms import PALETTE, Arm, arms_of, several_seeds
from fastlip.study.storage.files import write_text
from fastlip.study.storage.schema import Results

INK, MUTED, GRID, HEAT = "#1f2328", "#656d76", "#d0d7de", "#4a86c8"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a checkpoint's name may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
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
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
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
    draw: Callable[[Any], None],
    rows: Rows,
    header: Sequence[str],
    *,
    panels: tuple[int, int] = (1, 1),
    size: tuple[float, float] = (5.2, 3.0),
    legend: bool = True,
    share_axes: bool = True,
    heights: Sequence[float] | None = None,
) -> Figure:
    """Draw a figure, with a legend of the arms below it.

    Args:
        results: of the run.
        name: of the figure's files.
        caption: of the figure.
        draw: draws on the axes, an array of the shape ``panels``, and appends the data to ``rows``.
        rows: the list that ``draw`` appends to.
        header: names of the columns of ``rows``.
        panels: numbers of rows and columns of axes.
        size: width and height in inches, without the legend.
        legend: whether there is one; there is none where the arms stand along an axis.
        share_axes: whether all panels have the same axes.
        heights: of the rows of panels, relative to each other; all the same if None.
    """
    arms = arms_of(results) if legend else []
    columns = max(1, int(size[0] / (0.6 + 0.058 * max((len(_entry(results, a)) for a in arms), default=1))))
    lines = math.ceil(len(arms) / columns)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Figures share a page, and identifiers in their SVG must not collide: each has a salt of its own. The reader's
        # browser has the glyphs that the font, with which matplotlib measures text, may lack.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        canvas = Canvas(figsize=(size[0], size[1] + 0.17 * lines), layout="constrained")
        axes = canvas.subplots(*panels, squeeze=False, sharex=share_axes, sharey=share_axes, height_ratios=heights)
        draw(axes)
        if arms:
            _legend(canvas, results, arms, columns)
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
    # No larger than text beside it; points are 4/3 of a pixel.
    style = f"max-width: {float(view.split()[2]) * 1.6:.0f}px"
    svg = f'<svg viewBox="{view}" style="{style}" role="img" aria-label="{html.escape(figure.caption)}">{body}'
    svg = svg.replace("xlink:href", "href").replace("*{stroke-linejoin: round; stroke-linecap: butt}", "")
    # Groups of every figure have the same names, to which nothing refers.
    svg = re.sub('<g id="[^"]*"', "<g", svg)
    names = {INK: "ink", MUTED: "muted", GRID: "grid", HEAT: "heat"}
    names |= {light: f"arm{i}" for i, (light, _) in enumerate(PALETTE)}
    for colour, name in names.items():
        svg = svg.replace(f": {colour}", f": var(--{name})")
    return svg


def curves(
    axes: Axes, arm: Arm, x: ArrayLike, values: ArrayLike, limits: ArrayLike | None = None, **style: Any
) -> None:
    """The mean over an arm's runs, and their range as a band.

    Args:
        axes: to draw on.
        arm: gives colour and line style.
        x: [points].
        values: [runs, points]; None or NaN where a run has no value, and the mean none either.
        limits: lower and upper limits [2, points] that make the band of a single run.
        style: of the line, over that of the arm.
    """
    found = np.array(values, dtype=float)
    places = np.asarray(x, dtype=float)
    style = {"color": arm.colour, "linestyle": arm.dashes} | style
    axes.plot(places, found.mean(0), **style)
    band = np.array(limits, dtype=float) if limits is not None else np.array([found.min(0), found.max(0)])
    if len(found) > 1:
        band = np.array([found.min(0), found.max(0)])
    if len(found) > 1 or limits is not None:
        axes.fill_between(places, *band, color=arm.colour, alpha=0.15, linewidth=0)


def band_in_words(results: Results) -> str:
    """What lines and bands are, for captions of figures by :func:`curves`; empty for one seed."""
    return " Lines: means over seeds; bands: their range." if several_seeds(results) else ""


def depth_shares(count: int) -> np.ndarray:
    """Places of ``count`` consecutive layers along the depth of a network, from 0 to 1."""
    return np.linspace(0, 1, count) if count > 1 else np.ones(count)


def log_scale(axes: Axes, side: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with numbers that are read at a glance."""
    axis: Axis = getattr(axes, f"{side}axis")
    axes.set(**{f"{side}scale": "log"})
    low, high = sorted(getattr(axes, f"get_{side}lim")())
    if not 0 < low < high:  # nothing is drawn that has a logarithm
        low, high = 0.1, 10.0
        axes.set(**{f"{side}lim": (low, high)})
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    if decades < 0.4:
        axis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def shares_upward(axes: Axes) -> None:
    """Set the vertical axis to per cent from 0 to 100."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def unit_across(axes: Axes) -> None:
    """Set few ticks, with short numbers, to a horizontal axis from 0 to 1: panels stand close to each other."""
    axes.set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])


def counts_across(axes: Axes) -> None:
    """Set the ticks of the horizontal axis to whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def arms_downward(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a figure whose vertical axis lists arms, the first at the top."""
    axes.set_yticks(range(len(names)), list(map(label, names)))
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def draw_interval(
    axes: Axes, y: float, value: float | None, low: float | None, high: float | None, **style: Any
) -> None:
    """A point at ``y`` with its interval; arrows stand for limits that do not exist, a dash for such a value.

    Args:
        axes: to draw on.
        y: place along the vertical axis.
        value: along the horizontal axis.
        low: lower limit.
        high: upper limit.
        style: of the point; the interval takes its colour.
    """
    text = {"va": "center_baseline", "color": style["color"], "fontsize": 9}
    if value is None:
        axes.text(0.01, y, "–", transform=axes.get_yaxis_transform(), **text)
        return
    axes.plot(
        [value if low is None else low, value if high is None else high], [y, y], "-", color=style["color"], lw=1.4
    )
    axes.plot(value, y, linestyle="none", **style)
    for limit, arrow, side in ((low, "←", "right"), (high, "→", "left")):
        if limit is None:
            axes.annotate(
                arrow, (value, y), (5 if side == "left" else -5, 0), textcoords="offset points", ha=side, **text
            )


def label(name: str) -> str:
    """A name that fits beside an axis: in two lines where it is long, and cut after these."""
    lines = textwrap.wrap(name, 28) or [""]
    return "\n".join(lines if len(lines) < 3 else [lines[0], f"{lines[1][:27]}…"])


def _entry(results: Results, arm: Arm) -> str:
    name = arm.name if len(arm.name) <= 36 else f"{arm.name[:35]}…"
    return name + (f", {len(arm.models)} seeds" if several_seeds(results) else "")


def _legend(canvas: Canvas, results: Results, arms: Sequence[Arm], columns: int) -> None:
    """A legend with one entry for each arm, however many curves the arm has."""
    handles = [Line2D([], [], color=a.colour, linestyle=a.dashes, marker=a.marker, markersize=4) for a in arms]
    # matplotlib would leave out names that begin with an underscore.
    legend = canvas.legend(
        handles,
        ["arm"] * len(arms),
        loc="outside lower left",
        ncols=columns,
        handlelength=3.4,
        borderpad=0.1,
        columnspacing=1.2,
    )
    for text, arm in zip(legend.get_texts(), arms, strict=True):
        text.set_text(_entry(results, arm))
