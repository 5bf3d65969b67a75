"""The tables of the page of results, made from the committed CSV files."""

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import results_tables

    return results_tables


def test_every_table_that_the_page_shows_is_made(tables, tmp_path):
    tables.write(tmp_path)
    shown = re.findall(r"{include} _build/tables/(\w+\.md)", (DOCS / "results.md").read_text())
    assert {"strength_suites.md", "strength_norms.md"} <= set(shown)
    for name in shown:
        assert "\n| --- |" in (tmp_path / name).read_text().replace("|---|", "| --- |"), name


@pytest.mark.parametrize("name", ["strength_suites", "strength_norms"])
def test_a_table_has_a_line_for_each_row(tables, tmp_path, name):
    tables.write(tmp_path)
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    rows = tables.rows_of(name)
    assert rows
    for row in rows:
        assert any(line.startswith(f"| {row['network']}, ") and f": {row['what']} |" in line for line in lines)
