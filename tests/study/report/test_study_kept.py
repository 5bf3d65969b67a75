"""The results in the repository can be loaded, and give the same report again."""

import os
import shutil
from pathlib import Path

import pytest

from fastlip.study import frame, image_frame
from fastlip.study.errors import StudyError
from fastlip.study.report import html_report
from fastlip.study.report.compare import compare
from fastlip.study.storage.earlier_versions import is_earlier
from fastlip.study.storage.files import read_json
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Results

ALL = sorted((Path(__file__).parents[3] / "benchmarks" / "results" / "study").glob("*/config.json"))
EARLIER = [path for path in ALL if is_earlier(read_json(path))]
KEPT = [path for path in ALL if path not in EARLIER]


def test_there_are_results_on_real_data():
    assert any(not read_json(path.parent / "results.json")["generated"] for path in KEPT)


@pytest.mark.parametrize("config", KEPT, ids=lambda path: path.parent.name)
def test_kept_results_have_the_schema_and_give_the_report(config, tmp_path, conforms):
    results = read_json(config.parent / "results.json")
    conforms(results, Results)
    assert [v["rule"] for v in results["verdicts"]] == read_json(config)["rules"]
    run = tmp_path / "run"
    shutil.copytree(config.parent, run)
    for path in [run / "report.html", *(run / "tables").iterdir()]:
        path.unlink()
    html_report.write(RunDirectory(run))
    for path in (config.parent / "tables").iterdir():
        assert (run / "tables" / path.name).read_text() == path.read_text()
    html = (run / "report.html").read_text()
    assert "magnified" in html
    assert os.sep + "tmp" not in html
    assert len(frame(run)) > 50
    assert set(image_frame(run).measurement) == {"clean-attacked", "smallest-gaussian", "smallest-pgd"}
    assert compare([run, config.parent])[2].rows == ()


@pytest.mark.parametrize("config", EARLIER, ids=lambda path: path.parent.name)
def test_kept_results_of_an_earlier_version_are_left_alone_and_load(config):
    with pytest.raises(StudyError, match=r"fastlip 0\.1"):
        RunDirectory(config.parent)
    assert len(frame(config.parent)) > 50
