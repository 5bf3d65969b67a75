"""A run directory of an earlier version ends every command in one line that says which version reads it, unchanged.

``earlier_run.tar.xz`` is a run of one arm on generated images (version 0.1.0), without its checkpoints, tables, figures
and report. Never make it anew: where this test fails, the code has changed what it reads.
"""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from fastlip.study import cli, frame, image_frame
from fastlip.study.errors import StudyError
from fastlip.study.pipeline.start_or_resume import require_resumable
from fastlip.study.storage import digests


@pytest.fixture
def earlier(tmp_path):
    path = tmp_path / "run"
    with tarfile.open(Path(__file__).with_name("earlier_run.tar.xz")) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (path / "report.html").write_text("<html></html>\n")
    return path


def contents(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "RUN"),
        ("compare", "RUN", "RUN"),
        ("--preset", "demo", "--out", "RUN"),
        ("plan", "--preset", "demo", "--out", "RUN"),
    ],
    ids=["report", "compare", "resumed", "plan"],
)
def test_every_command_names_the_version_that_reads_it(earlier, arguments, monkeypatch, capsys):
    before = contents(earlier)
    monkeypatch.setattr(sys, "argv", ["fastlip.study", *(str(earlier) if a == "RUN" else a for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert said.startswith(f"error: {earlier} is a run of fastlip 0.1, ")
    assert "complete there, as that version wrote them: report.html and results.json" in said
    assert contents(earlier) == before


def test_only_what_is_complete_is_called_so(earlier, monkeypatch, capsys):
    (earlier / "report.html").write_text("<html>")
    (earlier / "tables").mkdir()
    (earlier / "tables" / "results.csv").write_text("model\n")
    (earlier / "figures").mkdir()
    (earlier / "figures" / "a.svg").write_text("<svg/>")
    monkeypatch.setattr(sys, "argv", ["fastlip.study", "report", str(earlier)])
    with pytest.raises(SystemExit):
        cli.main()
    assert ": results.json, the tables and the figures." in capsys.readouterr().err


def test_its_numbers_load_where_they_were_written(earlier):
    with pytest.raises(StudyError, match=r"is a run of fastlip 0\.1"):
        frame(earlier)
    (earlier / "tables").mkdir()
    (earlier / "tables" / "results.csv").write_text("model,n,value,low\nscratch-s0,5,0.5,\n")
    assert frame(earlier).iloc[0].tolist()[:3] == ["scratch-s0", 5.0, 0.5]
    assert set(image_frame(earlier).model) == {"scratch-s0", "scratch-s0-e1"}


def test_a_run_from_before_there_were_bounds_on_norms_is_opened_and_resumed(finished, micro, tmp_path, monkeypatch):
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    config = json.loads((path / "config.json").read_text())
    del config["settings"]["norm_bounds"]
    (path / "config.json").write_text(json.dumps(config))
    digests.record(path, [path / "config.json"])
    require_resumable(path, micro, config["inputs"])
    (path / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["fastlip.study", "report", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert (path / "report.html").exists()
    assert json.loads((path / "config.json").read_text()) == config
