"""report.html, a self-contained page that begins with the verdicts, and the files of its tables and figures."""

import base64
import re

import jinja2
import numpy as np
from markupsafe import Markup

from fastlip.study.report import (
    arms,
    depth_figures,
    drawing,
    number_format,
    robustness_figures,
    spectra_figures,
    tables,
    training_figures,
)
from fastlip.study.report.attack_tables import attack_table, corruption_table, strong_table
from fastlip.study.report.certificate_tables import certificate_table, lipschitz_table
from fastlip.study.report.example_images import examples
from fastlip.study.report.long_csv import long_csv
from fastlip.study.report.number_format import ball_name
from fastlip.study.report.summary_tables import arm_table, power_table, seed_table
from fastlip.study.report.tables import Table
from fastlip.study.settings.serialization import dotted_names
from fastlip.study.storage.array_files import read_measured
from fastlip.study.storage.files import write_text
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import GENERATED, Results


def write(run: RunDirectory) -> str:
    """Write tables, figures and report.html from the stored results; return the path of the report.

    Raises:
        StudyError: stored results are missing or damaged; nothing is written then.
    """
    run.require_unobstructed(*(run.images(model.name, "clean-attacked") for model in run.models))
    results, timings = run.read_results(), _timings(run)
    run.require_intact(run.config_file)
    shown = examples(run, results["classes"])
    every_table = all_tables(results)
    accuracy = robustness_figures.accuracy_figures(results)
    single = [
        robustness_figures.distortion_figure(results, _distortions(run)),
        depth_figures.layer_figure(results),
        training_figures.training_figure(results),
        depth_figures.stretch_figure(results),
        depth_figures.growth_figure(results),
        spectra_figures.rank_figure(results),
        spectra_figures.weight_figure(results),
        spectra_figures.profile_figure(results),
        training_figures.trajectory_figure(results),
        robustness_figures.corruption_figure(results),
    ]
    tables.write(run.tables, [table for table in every_table if table.rows])
    drawing.write(run.figures, [*accuracy, *single])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastlip.study.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number_format.number,
        "percent": number_format.percent,
        "interval": number_format.interval,
        "distortion": number_format.distortion,
        "power": number_format.power,
        "ball": lambda strong: ball_name(strong["norm"], strong["strength"]),
        "unbroken": lambda cell: re.sub(r"(?<=\de)-(?=\d)", "\u2011", cell),  # 8e-08 stays on one line
        "svg": lambda figure: Markup(drawing.inline(figure)),
        "data": lambda figure: "data:text/csv;base64," + base64.b64encode(figure.csv.encode()).decode(),
    }
    html = environment.get_template("report.html").render(
        r=results,
        generated=GENERATED,
        tables={table.name: table for table in every_table},
        accuracy=accuracy,
        figures={figure.name: figure for figure in single},
        examples=shown,
        arms=arms.ARM_NAMES,
        config=run.config,
        settings=dotted_names(run.settings),
        timings=timings,
    )
    # A no-break space keeps a sample size on the line of its "n".
    with run.recorded(*run.written_by_report):
        write_text(run.tables / "results.csv", long_csv(results))
        write_text(run.report, html.replace("(n = ", "(n\u00a0=\u00a0"))
    return str(run.report)


def all_tables(results: Results) -> list[Table]:
    return [
        seed_table(results),
        attack_table(results),
        lipschitz_table(results),
        arm_table(results),
        strong_table(results),
        corruption_table(results),
        certificate_table(results),
        power_table(results),
    ]


def _timings(run: RunDirectory) -> dict[str, float]:
    """Seconds of each stage except the report, which is not over yet."""
    return {stage: seconds for stage, seconds in run.read_timings().items() if stage != "report"}


def _distortions(run: RunDirectory) -> dict[str, dict[str, np.ndarray]]:
    """The smallest distortions of the images that each model classifies correctly."""
    found = {}
    for model in run.models:
        clean = read_measured(run.images(model.name, "clean-attacked"))
        right = clean["prediction"] == clean["label"]
        found[model.name] = {
            kind: read_measured(run.images(model.name, f"smallest-{kind}"), len(right))["distortion"][right]
            for kind in ("pgd", "gaussian")
        }
    return found
