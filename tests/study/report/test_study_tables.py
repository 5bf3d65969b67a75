import copy
import csv
import io
import math

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.statistics import proportion
from fastlip.study.report.number_format import interval, number, percent, power
from fastlip.study.report.summary_tables import arm_table
from fastlip.study.report.tables import Table
from fastlip.study.storage.files import read_json
from fastlip.study.storage.schema import Estimate


@pytest.mark.parametrize("log10", [-7.3, -0.2, 0.0, 1.9566, 3.9999, 4.0, 28.5012, 120.7])
def test_a_bound_is_rounded_upwards_and_by_less_than_two_percent(log10):
    shown = math.log10(float(power(log10)))
    assert 0 <= shown - log10 + 1e-12 < math.log10(1.02)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0"), (0.0012345, "0.00123"), (12.345, "12.3"), (1234.5, "1234"), (1.5e-9, "1.50e-09")],
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def estimate(value, low, high, n=4):
    return Estimate(n=n, value=value, low=low, high=high, confidence=0.95)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (estimate(0.5, 0.25, 1.0), "50.0 [25.0, 100] (n = 4)"),
        (estimate(0.5, 0.25, None), "50.0 [25.0, –] (n = 4)"),
        (estimate(0.5, None, None), "50.0 (n = 4)"),
        (estimate(None, None, None, 0), "does not exist (n = 0)"),
    ],
)
def test_intervals_show_what_exists(given, shown):
    assert interval(given, 100) == shown


def test_a_rate_shows_its_interval_and_size():
    assert percent(proportion(np.arange(96) < 90, 0.95)) == "93.8% [86.9%, 97.7%] (n = 96)"
    assert percent(proportion(np.zeros(0, dtype=bool), 0.95)) == "none (n = 0)"


def test_cells_survive_each_format():
    table = Table("t", "title", ("A|B", "C & D_1"), (("50% − ε", 'say "x", y'),), "a note")
    assert list(csv.reader(io.StringIO(table.csv()))) == [list(table.header), list(table.rows[0])]
    assert r"| A\|B | C & D_1 |" in table.markdown()
    assert r"C \& D\_1 \\" in table.latex()
    assert r"50\% $-$ $\varepsilon$" in table.latex()


def test_arms_are_summed_up_over_seeds(finished):
    results = read_json(finished.results)
    assert arm_table(results).rows == (), "one seed has no spread"
    shares = {"scratch": [0.5, 0.7, 0.6], "finetune": [0.8, 0.8, 0.8]}
    models = []
    for seed in range(3):
        for model in results["models"]:
            clean = model["clean"] | {"value": shares[model["arm"]][seed]}
            smallest = copy.deepcopy(model["smallest_pgd"])
            if (model["arm"], seed) == ("scratch", 1):
                smallest["median"]["value"] = None
            models.append(model | {"seed": seed, "clean": clean, "smallest_pgd": smallest})
    table = arm_table(results | {"models": models})
    assert table.header == ("Measure", "scratch", "fine-tuned")
    rows = {row[0]: row[1:] for row in table.rows}
    low, high = stats.t.interval(0.95, 2, 60.0, stats.sem([50.0, 70.0, 60.0]))
    assert rows["clean accuracy, %"] == (f"60.0 [{low:.1f}, {high:.1f}] (n = 3)", "80.0 [80.0, 80.0] (n = 3)")
    # A median that does not exist in one seed is not left out of the mean.
    assert rows["median smallest PGD distortion × 255"][0] == "does not exist (n = 0)"
    assert len([name for name in rows if name.startswith("accuracy, PGD")]) == 3
