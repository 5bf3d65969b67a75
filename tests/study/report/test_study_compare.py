"""Runs side by side, for people."""

import json

import pytest

from fastlip.study.errors import StudyError
from fastlip.study.report.compare import compare


@pytest.fixture
def two(written, synthetic):
    """Two runs that differ in seed count, in one setting, in a verdict and, far beyond chance, in one accuracy."""
    one = written(synthetic(0, ("scratch", "finetune")), "one")
    other = written(synthetic(0, ("scratch", "softmax")), "other", examples=3)
    path = other / "results.json"
    results = json.loads(path.read_text())
    results["verdicts"][2]["verdict"] = "supported"
    results["models"][0]["clean"] |= {"value": 0.2, "low": 0.19, "high": 0.21}
    path.write_text(json.dumps(results))
    return one, other


def test_differences_come_first_and_columns_are_few(two):
    runs, verdicts, settings, arms = compare(list(two))
    assert [row[:2] for row in runs.rows] == [("A", str(two[0])), ("B", str(two[1]))]
    assert verdicts.header == ("Question", "A", "B", "Differ")
    assert [(row[0][0], row[-1]) for row in verdicts.rows] == [("3", "yes"), ("1", "no"), ("2", "no"), ("4", "no")]
    assert dict((row[0], row[1:]) for row in settings.rows) == {
        "arms": ("scratch, finetune", "scratch, softmax"),
        "examples": ("6", "3"),
    }
    assert arms.header == ("Arm", "Measure", "A", "B", "Differ")
    assert arms.rows[0][:2] == ("from scratch", "clean accuracy, %")
    assert arms.rows[0][-1] == "yes"
    order = [row[-1] == "yes" for row in arms.rows]
    assert order == sorted(order, reverse=True)
    for table in (runs, verdicts, settings, arms):
        assert len(table.header) <= 5


def test_an_arm_that_one_run_lacks_is_said_to_be_lacking(two):
    rows = {row[:2]: row[2:] for row in compare(list(two))[3].rows}
    fine, small = rows["fine-tuned", "clean accuracy, %"], rows["softmax regression", "clean accuracy, %"]
    assert fine[1:] == ("not in it", "–")
    assert small[0] == "not in it"


def test_arms_of_several_seeds_are_compared_by_their_means(written, synthetic):
    runs = [written(synthetic(s, ("scratch",), seeds=3), f"run{s}") for s in (0, 1)]
    rows = compare(runs)[3].rows
    assert all("(n = 3)" in cell for row in rows for cell in row[2:4])


def test_a_run_does_not_differ_from_itself(two):
    _, verdicts, settings, arms = compare([two[0], two[0]])
    assert settings.rows == ()
    assert {row[-1] for row in verdicts.rows} == {"no"}
    assert "yes" not in {row[-1] for row in arms.rows}


def test_one_run_cannot_be_compared(two):
    with pytest.raises(StudyError, match="at least two"):
        compare([two[0]])


def test_there_may_be_more_runs_than_letters(two):
    assert compare([two[0]] * 28)[1].header[-4:] == ("Z", "AA", "AB", "Differ")
