"""The whole study at a size that takes seconds."""

import base64
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fastlip.models import load_checkpoint
from fastlip.study import frame, image_frame
from fastlip.study.errors import StudyError
from fastlip.study.pipeline import runner, start_or_resume
from fastlip.study.report import html_report
from fastlip.study.report.compare import compare
from fastlip.study.settings import overrides
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.settings.rules import rules_in_words
from fastlip.study.storage.files import read_arrays, read_json
from fastlip.study.storage.locks import directory_lock
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Results

QUIET = Console(quiet=True)


def test_results_have_the_schema_and_consistent_numbers(finished, micro, conforms):
    results = read_json(finished.results)
    conforms(results, Results)
    assert results["generated"] is True
    points = [("finetune", None), ("scratch", 1), ("scratch", None), ("softmax", None)]
    assert [(p["arm"], p["epoch"]) for p in results["points"]] == points
    assert [m["name"] for m in results["models"]] == ["softmax-s0", "scratch-s0", "finetune-s0"]
    for m in results["models"]:
        assert m["clean_acc"] == pytest.approx(100 * m["clean"]["value"])
        assert m["clean"]["n"] == micro.evaluation.clean_images
        assert len(m["attacks"]) == 4
        for attack in m["attacks"]:
            assert attack["accuracy"]["n"] == micro.evaluation.images
            assert attack["accuracy"]["low"] <= attack["accuracy"]["value"] <= attack["accuracy"]["high"]
            assert attack["distortion"]["n"] == m["attacked_clean"]["k"]
        for measured in (*m["attacks"], m["smallest_pgd"], m["smallest_gaussian"]):
            assert len(measured["depth"]["mean"]) == (len(m["depth_points"]) if measured["stretch"]["mean"]["n"] else 0)
            assert (measured["stretch"]["largest"] is None) == (measured["stretch"]["mean"]["n"] == 0)
        assert len(m["depth_points"]) == (0 if m["arm"] == "softmax" else 9)  # ResNet-18: its stem and eight blocks
        bound = m["lipschitz"]
        assert all(0 <= layer["lower"] <= layer["upper"] for layer in bound["layers"])
        assert len(bound["layers"]) == (1 if m["arm"] == "softmax" else 21)  # ResNet-18: 20 convolutions and the head
        product = sum(np.log10(layer["upper"]) for layer in bound["layers"])
        assert bound["log10_layer_product"] == pytest.approx(product)
        # Soundness, as far as data can tell: no observed stretch exceeds the certified constant.
        assert m["largest_stretch"] > 0
        assert np.log10(m["largest_stretch"]) <= bound["log10_upper"]
    assert [v["verdict"] for v in results["verdicts"]][2:] == ["undetermined", "undetermined"]


def test_numbers_follow_from_the_stored_images(finished):
    results = read_json(finished.results)
    for m in results["models"]:
        clean = read_arrays(finished.images(m["name"], "clean-attacked"))
        right = clean["prediction"] == clean["label"]
        pgd = read_arrays(finished.images(m["name"], "pgd-linf-8"))
        attack = next(a for a in m["attacks"] if a["norm"] == "linf" and a["strength"] > 0.03)
        assert attack["accuracy"]["k"] == int((pgd["prediction"] == pgd["label"]).sum())
        assert (pgd["linf"] <= 8 / 255 * (1 + 1e-5)).all()
        assert (pgd["distortion"][~right] == 0).all()  # what was wrong before is left alone
        smallest = read_arrays(finished.images(m["name"], "smallest-pgd"))
        assert np.isinf(smallest["distortion"][~smallest["found"]]).all()
        found = smallest["found"]
        np.testing.assert_allclose(smallest["distortion"][found], smallest["l2"][found] / np.sqrt(3 * 32 * 32))


def test_configuration_holds_rules_versions_and_build(finished, micro):
    config = read_json(finished.path / "config.json")
    assert config["rules"] == rules_in_words(micro.rules)
    assert {"python", "torch", "torchvision", "numpy", "scipy", "fastlip"} <= set(config["versions"])
    assert config["build"]["torch"] == torch.__version__
    assert config["seeds"] == [0]
    assert (finished.path / "config.json").stat().st_mtime_ns < finished.results.stat().st_mtime_ns


def test_checkpoints_are_safetensors_and_nothing_unfinished_is_left(finished):
    for name in ("source", "softmax-s0", "scratch-s0", "finetune-s0"):
        assert load_checkpoint(finished.checkpoint(name))[0]
    left = [p for p in finished.path.rglob("*") if "unfinished" in p.name or ".part" in p.name]
    assert left == []


class Interrupted(BaseException):
    """Simulates a kill: nothing in the study catches it."""


def test_interrupted_at_every_write_and_resumed_gives_identical_results(finished, micro, tmp_path, monkeypatch):
    real, seen = os.replace, set()

    def replace(source, target):
        path = Path(target).relative_to(tmp_path / "run")
        # Tables and figures are made together: once in each folder is enough.
        name = path.parts[0] if path.parts[0] in ("tables", "figures") else path.as_posix()
        if name not in seen:
            seen.add(name)
            raise Interrupted(name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in itertools.count():
        try:
            run = runner.run(micro, InputPaths(), tmp_path / "run", QUIET)
            break
        except Interrupted:
            pass
    written = {p.relative_to(finished.path) for p in finished.path.rglob("*") if p.is_file()}
    assert seen >= {p.parts[0] if p.parts[0] in ("tables", "figures") else p.as_posix() for p in written}
    assert sum("unfinished" in name for name in seen) == 4  # each training run was stopped on its way, too
    assert run.results.read_bytes() == finished.results.read_bytes()
    for path in finished.path.glob("images/*/*.npz"):
        again = read_arrays(run.path / path.relative_to(finished.path))
        for name, values in read_arrays(path).items():
            np.testing.assert_array_equal(values, again[name])


def test_the_terminal_says_generated_and_shows_progress(micro, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    # As far as the first stage that nothing but this test runs twice.
    with pytest.raises(StudyError, match="not finite"):
        runner.run(overrides.override(micro, ["pretrain.max_lr=1e30"]), InputPaths(), tmp_path / "run", console)
    assert "G E N E R A T E D   I M A G E S" in screen.getvalue()
    assert "source: pre-training" in screen.getvalue()


def test_running_again_does_nothing(finished, micro):
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.is_file()}
    runner.run(micro, InputPaths(), finished.path, QUIET)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_report_is_rebuilt_from_stored_results_alone(finished):
    before = {p: p.read_bytes() for p in [finished.report, *finished.tables.iterdir(), *finished.figures.iterdir()]}
    for path in before:
        path.unlink()
    html_report.write(RunDirectory(finished.path))
    assert {p: p.read_bytes() for p in before} == before


class References(HTMLParser):
    """Every address a browser would follow or fetch."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.open = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "data", "poster", "action", "srcset")]
        if tag not in ("meta", "br", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_report_is_self_contained_and_says_generated(finished):
    html = finished.report.read_text()
    parser = References()
    parser.feed(html)
    assert parser.found, "the report shows images"
    assert all(
        reference.startswith(("data:image/png;base64,", "data:text/csv;base64,", "#")) for reference in parser.found
    )
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert "<strong>GENERATED IMAGES</strong>" in html
    assert html.index("GENERATED IMAGES") < html.index("The four answers") < html.index("seed-table")
    assert "@media screen and (prefers-color-scheme: dark)" in html  # paper is white whatever the screen is
    assert 'name="viewport"' in html
    assert "@media print" in html


def test_seed_table_has_the_decks_shape_in_three_formats(finished):
    lines = (finished.tables / "seed.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert [name for name in header if not name.startswith(("Found", "Stretch"))] == [
        "Model", "Attack", "Average Distortion × 255", "Upper Lipschitz Constant", "Clean Accuracy",
    ]  # fmt: skip
    assert len(lines) == 1 + 6 + 4  # ours and the deck's
    markdown = (finished.tables / "seed.md").read_text()
    assert "GENERATED IMAGES" in markdown
    assert re.search(r"fine-tuned \(seed deck\) +\| Gaussian +\| 33\.70 ", markdown)
    latex = (finished.tables / "seed.tex").read_text()
    assert "%" not in re.sub(r"\\%|^%.*$", "", latex, flags=re.M)


def test_figures_have_their_data_beside_them(finished):
    drawings = sorted(p.stem for p in finished.figures.glob("*.svg"))
    assert drawings == sorted(p.stem for p in finished.figures.glob("*.csv"))
    assert len(drawings) == 19
    html = finished.report.read_text()
    for path in finished.figures.glob("*.csv"):
        assert len(path.read_text().splitlines()) > 1
        assert base64.b64encode(path.read_bytes()).decode() in html


def test_results_load_into_pandas_in_one_line(finished):
    numbers, images = frame(finished.path), image_frame(finished.path)
    clean = numbers[(numbers.measure == "clean") & (numbers.model == "scratch-s0") & (numbers.part == "models")]
    results = read_json(finished.results)
    (scratch,) = (m for m in results["models"] if m["name"] == "scratch-s0")
    assert clean.value.item() == pytest.approx(scratch["clean"]["value"])
    found = images[(images.model == "scratch-s0") & (images.measurement == "clean-attacked")]
    assert (found.prediction == found.label).sum() == scratch["attacked_clean"]["k"]
    with pytest.raises(StudyError, match="missing"):
        frame(finished.path / "nowhere")


def test_runs_are_set_side_by_side(finished):
    found = compare([finished.path, finished.path])
    assert [table.name for table in found] == ["runs", "verdicts", "settings", "arms"]
    assert found[1].rows[0][1:] == ("undetermined", "undetermined", "no")
    assert found[2].rows == ()
    with pytest.raises(StudyError, match="at least two"):
        compare([finished.path])


@pytest.mark.parametrize("change", [{"seed": 1}, {"examples": 3}])
def test_another_configuration_in_the_same_directory_is_refused(finished, micro, change):
    with pytest.raises(StudyError, match=f"another configuration: {next(iter(change))}") as caught:
        runner.run(dataclasses.replace(micro, **change), InputPaths(), finished.path, QUIET)
    assert caught.value.status == 2


def test_a_directory_that_is_no_run_is_left_alone(micro, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StudyError, match="not a run"):
        runner.run(micro, InputPaths(), tmp_path, QUIET)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("device", ["quantum", "cuda:99" if not torch.cuda.is_available() else "quantum:1"])
def test_a_device_that_is_not_there_is_one_line(micro, tmp_path, device):
    with pytest.raises(StudyError, match=f"--device {device}") as caught:
        runner.run(dataclasses.replace(micro, device=device), InputPaths(), tmp_path / "run", QUIET)
    assert caught.value.status == 2
    assert not (tmp_path / "run").exists()


def test_other_rules_than_those_of_the_beginning_are_refused(finished, micro, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    config = read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps(config | {"rules": ["another rule", *config["rules"][1:]]}))
    (run / "results.json").unlink()
    with pytest.raises(StudyError, match="rules of the verdicts"):
        runner.run(micro, InputPaths(), run, QUIET)
    assert not (run / "results.json").exists()


def test_a_run_that_another_process_begins_first_is_looked_at_again(finished, micro, tmp_path, monkeypatch):
    run, real = tmp_path / "run", start_or_resume.locks.directory_lock

    def locked_late(path, join, **options):
        run.mkdir(exist_ok=True)
        shutil.copy(finished.path / "config.json", run)
        return real(path, join, **options)

    monkeypatch.setattr(start_or_resume.locks, "directory_lock", locked_late)
    with pytest.raises(StudyError, match="another configuration: seed"):
        runner.run(dataclasses.replace(micro, seed=1), InputPaths(), run, QUIET, join=True)


def test_a_second_process_is_kept_out(finished, micro):
    with directory_lock(finished.path), pytest.raises(StudyError, match="another process"):
        runner.run(micro, InputPaths(), finished.path, QUIET)


def test_a_truncated_checkpoint_is_one_line_and_nothing_is_lost(finished, micro):
    path = finished.checkpoint("scratch-s0")
    whole, measured = path.read_bytes(), finished.images("scratch-s0", "clean")
    kept = measured.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        measured.unlink()
        with pytest.raises(StudyError, match=r"scratch-s0\.safetensors.*delete"):
            runner.run(micro, InputPaths(), finished.path, QUIET)
        assert path.exists()
    finally:
        path.write_bytes(whole)
        measured.write_bytes(kept)


def test_results_of_another_version_are_refused(finished):
    text = finished.results.read_text()
    try:
        finished.results.write_text(json.dumps(json.loads(text) | {"schema": "fastlip.study.results/99"}))
        with pytest.raises(StudyError, match="results/99"):
            html_report.write(finished)
    finally:
        finished.results.write_text(text)
