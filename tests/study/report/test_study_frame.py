"""The frame of a run holds every number of its results.json, and what each is about."""

import csv
import io
import re

from fastlip.study import frame
from fastlip.study.report import html_report
from fastlip.study.report.long_csv import LONG, TEXT, long_csv
from fastlip.study.storage.run_directory import RunDirectory


def numbers(value):
    """Every number in plain JSON."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def estimates(value):
    """Every estimate and proportion in plain JSON."""
    if isinstance(value, dict) and {"value", "confidence"} <= set(value):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from estimates(inner)


def test_every_number_is_in_a_cell(world):
    rows = list(csv.DictReader(io.StringIO(long_csv(world[1]))))
    held = {float(row[column]) for row in rows for column in LONG if column not in TEXT and row[column]}
    assert {v for v in numbers(world[1]) if v not in held} == set()


def test_every_estimate_is_one_row(world):
    rows = list(csv.DictReader(io.StringIO(long_csv(world[1]))))
    found = [[row[side] for side in ("n", "value", "low", "high")] for row in rows if row["n"]]
    wanted = [
        ["" if e[side] is None else str(e[side]) for side in ("n", "value", "low", "high")] for e in estimates(world[1])
    ]
    assert sorted(found) == sorted(wanted)


def test_no_two_rows_are_about_the_same(world):
    rows = list(csv.DictReader(io.StringIO(long_csv(world[1]))))
    about = [tuple(row[c] for c in LONG if c not in ("k", "n", "value", "low", "high", "confidence")) for row in rows]
    assert len(set(about)) == len(about)


def test_pandas_reads_names_and_numbers_as_they_are(written, synthetic):
    run = written(synthetic(0, ("NA", "007")))
    html_report.write(RunDirectory(run))
    table = frame(run)
    results = RunDirectory(run).read_results()
    assert tuple(table.columns) == LONG
    assert set(table.model[table.part == "models"]) == {"NA", "007"}
    for m in results["models"]:
        (row,) = table[(table.model == m["name"]) & (table.measure == "clean")].to_dict("records")
        assert [row[side] for side in ("k", "n", "value")] == [m["clean"][side] for side in ("k", "n", "value")]
        norms = table[(table.model == m["name"]) & (table.measure == "lipschitz.layers.upper")]
        layers = m["lipschitz"]["layers"]
        assert dict(zip(norms["item"], norms["value"], strict=True)) == {
            layer["name"]: layer["upper"] for layer in layers
        }
        pgd = table[(table.model == m["name"]) & (table.measure == "attacks.accuracy") & (table.norm == "linf")]
        assert pgd.strength.tolist() == [a["strength"] for a in m["attacks"] if a["norm"] == "linf"]
    held = {v for column in LONG if column not in TEXT for v in table[column].dropna().tolist()}
    assert set(numbers(results)) <= held


def test_tables_of_all_formats_have_the_same_cells(world):
    for table in [t for t in html_report.all_tables(world[1]) if t.rows]:
        assert [tuple(row) for row in csv.reader(io.StringIO(table.csv()))] == [table.header, *table.rows]
        lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
        cells = [tuple(plain(c) for c in re.split(r" (?<!\\\\)\| ", line[2:-2])) for line in lines]
        expected = [tuple(" ".join(c.split()) for c in row) for row in (table.header, *table.rows)]
        assert [cells[0], *cells[2:]] == expected
        assert {len(line) for line in lines} == {len(lines[0])}, "columns are aligned"


def plain(cell):
    """The text that a cell of Markdown shows."""
    return re.sub(r"\\([!-/:-@[-`{-~])", r"\1", cell).strip()
