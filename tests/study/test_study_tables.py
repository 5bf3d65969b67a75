import csv
import io
import math

import numpy as np
import pytest

from fastlip.study.statistics import Estimate, rate
from fastlip.study.tables import Table, interval, number, percent, power


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
    assert percent(rate(np.arange(96) < 90, 0.95)) == "93.8% [86.9%, 97.7%] (n = 96)"
    assert percent(rate(np.zeros(0, dtype=bool), 0.95)) == "none (n = 0)"


def test_cells_survive_each_format():
    table = Table("t", "title", ("A|B", "C & D_1"), (("50% − ε", 'say "x", y'),), "a note")
    assert list(csv.reader(io.StringIO(table.csv()))) == [list(table.header), list(table.rows[0])]
    assert r"| A\|B | C & D_1 |" in table.markdown()
    assert r"C \& D\_1 \\" in table.latex()
    assert r"50\% $-$ $\varepsilon$" in table.latex()
