"""report.html, a self-contained page that begins with the answers, and the files of its tables and figures."""

import base64
import re
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fastlip._text import printable
from fastlip.study.analysis.titles import network_title
from fastlip.study.report import (
    arms,
    depth_figures,
    drawing,
    number_format,
    question_figures,
    robustness_figures,
    spectra_figures,
    tables,
    training_figures,
)
from fastlip.study.report.attack_tables import (
    attack_table,
    corrupted_table,
    corruption_table,
    smallest_table,
    strong_table,
    transfer_table,
)
from fastlip.study.report.certificate_tables import certificate_table, lipschitz_table
from fastlip.study.report.difference_table import difference_table
from fastlip.study.report.drawing import Figure
from fastlip.study.report.example_images import Example, examples
from fastlip.study.report.long_csv import long_csv
from fastlip.study.report.summary_tables import arm_table, model_table, power_table, seed_by_seed_table, seed_table
from fastlip.study.report.tables import Table
from fastlip.study.settings.serialization import dotted_names
from fastlip.study.storage.array_files import read_measured
from fastlip.study.storage.files import write_text
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import GENERATED, Results

#: Number of examples that are seen at once; the others are folded.
_LEADING = 4


def write(run: RunDirectory) -> str:
    """Write tables, figures and report.html from the stored results; return the path of the report.

    Raises:
        StudyError: stored results are missing or damaged; nothing is written then.
    """
    run.require_unobstructed(*(run.images(model.name, "clean-attacked") for model in run.models))
    results, timings = run.read_results(), _timings(run)
    run.require_intact(run.config_file)
    shown = examples(run, results)
    every_table = all_tables(results)
    figures = all_figures(results, _distortions(run, results))
    tables.write(run.tables, [table for table in every_table if table.rows])
    drawing.write(run.figures, figures)
    html = page(results, every_table, figures, shown, run.config, dotted_names(run.settings), timings)
    with run.recorded(*run.written_by_report):
        write_text(run.tables / "results.csv", long_csv(results))
        write_text(run.report, html)
    return str(run.report)


def page(
    results: Results,
    every_table: list[Table],
    figures: list[Figure],
    shown: list[Example],
    config: dict[str, Any],
    settings: dict[str, Any],
    timings: dict[str, float],
) -> str:
    """The text of report.html.

    Args:
        results: of the run.
        every_table: by :func:`all_tables`.
        figures: by :func:`all_figures`.
        shown: example images, ordered by image.
        config: config.json.
        settings: of the run, by their dotted names.
        timings: seconds of each stage.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastlip.study.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number_format.number,
        "interval": number_format.interval,
        "printable": printable,
        "title": arms.title,
        "network": lambda model: printable(network_title(model["architecture"])),
        "unbroken": lambda cell: re.sub(r"(?<=\de)-(?=\d)", "\u2011", cell),  # 8e-08 stays on one line
        "svg": lambda figure: Markup(drawing.inline(figure)),
        "data": lambda figure: "data:text/csv;base64," + base64.b64encode(figure.csv.encode()).decode(),
    }
    # The models of the first seed stand for all where a table of every layer would be too long.
    leading = [m for m in results["models"] if m["seed"] == results["models"][0]["seed"]]
    html = environment.get_template("report.html").render(
        r=results,
        generated=GENERATED,
        given=all(model["role"] == "checkpoint" for model in results["models"]),
        tables={table.name: table for table in every_table},
        figures={figure.name: figure for figure in figures},
        accuracy=[figure for figure in figures if figure.name.startswith("accuracy-")],
        unstability=[figure for figure in figures if figure.name.startswith("unstability-")],
        examples=[e for e in shown if e.number == 0][:_LEADING],
        further=[e for e in shown if e.number > 0] + [e for e in shown if e.number == 0][_LEADING:],
        leading=leading,
        several=arms.several_seeds(results),
        palette=arms.PALETTE,
        config=config,
        settings=settings,
        timings=timings,
    )
    # A no-break space keeps a sample size on the line of its "n".
    return html.replace("(n = ", "(n\u00a0=\u00a0")


def all_tables(results: Results) -> list[Table]:
    return [
        seed_table(results),
        seed_by_seed_table(results),
        model_table(results),
        arm_table(results),
        smallest_table(results),
        difference_table(results),
        transfer_table(results),
        attack_table(results),
        strong_table(results),
        corrupted_table(results),
        corruption_table(results),
        lipschitz_table(results),
        certificate_table(results),
        power_table(results),
    ]


def all_figures(results: Results, distortions: dict[str, dict[str, np.ndarray]]) -> list[Figure]:
    """The figures of a run; those of what it did not measure are left out.

    Args:
        results: of the run.
        distortions: as for :func:`fastlip.study.report.robustness_figures.distortion_figure`.
    """
    drawn = [
        robustness_figures.distortion_figure(results, distortions),
        robustness_figures.ratio_figure(results),
        *question_figures.difference_figures(results),
        *question_figures.unstability_figures(results),
        question_figures.transfer_figure(results),
        *robustness_figures.accuracy_figures(results),
        robustness_figures.corruption_figure(results),
        robustness_figures.corruption_distortion_figure(results),
        depth_figures.layer_figure(results),
        depth_figures.stretch_figure(results),
        depth_figures.growth_figure(results),
        spectra_figures.rank_figure(results),
        spectra_figures.weight_figure(results),
        spectra_figures.profile_figure(results),
        training_figures.training_figure(results),
    ]
    return [figure for figure in drawn if figure is not None]


def _timings(run: RunDirectory) -> dict[str, float]:
    """Seconds of each stage except the report, which is not over yet."""
    return {stage: seconds for stage, seconds in run.read_timings().items() if stage != "report"}


def _distortions(run: RunDirectory, results: Results) -> dict[str, dict[str, np.ndarray]]:
    """The smallest distortions of the images that each model classifies correctly."""
    found = {}
    for name in (m["name"] for m in results["models"]):
        clean = read_measured(run.images(name, "clean-attacked"))
        right = clean["prediction"] == clean["label"]
        found[name] = {
            kind: read_measured(run.images(name, f"smallest-{kind}"), len(right))["distortion"][right]
            for kind in ("pgd", "gaussian")
        }
    return found
