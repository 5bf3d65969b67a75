"""A run directory of an earlier version opens, resumes and reports: names of its files, keys and settings are kept.

``earlier_run.tar.xz`` is a run of one arm on generated images (version 0.1.0, before the study had rooms), without its
checkpoints, tables, figures and report. Never make it anew: where this test fails, the code has changed what it reads.
"""

import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from fastlip.models import save_checkpoint
from fastlip.study import frame
from fastlip.study.pipeline import runner
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.storage.files import read_json
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.training.architectures import build


def is_about(found, expected, where="results"):
    """Equal but for the rounding of sums, which NumPy and SciPy may order otherwise."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            is_about(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            is_about(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9), where
    else:
        assert found == expected, where


def test_an_earlier_run_resumes_and_reports_what_it_did(tmp_path):
    path = tmp_path / "run"
    with tarfile.open(Path(__file__).with_name("earlier_run.tar.xz")) as archive:
        archive.extractall(path, filter="data")
    run = RunDirectory(path)
    expected, timings = read_json(run.results), run.read_timings()
    # Checkpoints are large, and nothing that is left to do reads them.
    for model in [*run.models, *run.snapshots]:
        checkpoint = run.checkpoint(model.name)
        checkpoint.parent.mkdir(exist_ok=True)
        save_checkpoint(checkpoint, build(run.settings.architecture, len(expected["classes"]), run.settings.stem, 0))
    kept = {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.parent != path}
    run.results.unlink()
    runner.run(run.settings, InputPaths(), path, Console(quiet=True))
    is_about(read_json(run.results), expected)
    assert {p: p.read_bytes() for p in kept} == kept
    done = run.read_timings()
    assert done.keys() == timings.keys()
    assert {stage for stage in done if done[stage] != timings[stage]} <= {"results", "report"}
    assert run.report.read_text().endswith("</html>")
    assert len(frame(path)) > 20
