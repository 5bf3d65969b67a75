"""Every number of a run in one long CSV table."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from fastlip.study.storage.schema import Results

#: Columns of the table that hold text.
TEXT = ("part", "measure", "model", "against", "arm", "attack", "norm", "condition", "item")

#: Columns of the table: where a number stands in results.json, and the number with its interval.
LONG = (*TEXT, "question", "seed", "epoch", "strength", "index", "k", "n", "value", "low", "high", "confidence")

#: Columns of the keys that say what the numbers beside them are about, by part of the results where that matters.
_COLUMNS = {
    "arm": "arm",
    "against": "against",
    "target": "against",
    "attack": "attack",
    "norm": "norm",
    "condition": "condition",
    "corruption": "item",
    "layer": "item",
    "name": "item",
    "stage": "item",
    "assumption": "item",
    "seed": "seed",
    "epoch": "epoch",
    "strength": "strength",
    "severity": "strength",
    "radius": "strength",
}
_OF_PART = {
    "models": {"name": "model"},
    "points": {"run": "model"},
    "comparisons": {"measure": "item"},
    "transfer": {"source": "model"},
    "verdicts": {"number": "question"},
    "power": {"question": "question"},
    "seed_deck": {"model": "model"},
}


def long_csv(results: Results) -> str:
    """All numbers with their intervals, one estimate, proportion or single number in each row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, LONG, restval="", lineterminator="\n")
    writer.writeheader()
    for part, entries in results.items():
        # The rest of results.json is text.
        for entry in entries if part in _OF_PART else []:  # type: ignore[attr-defined]
            writer.writerows(_rows(entry, "", {"part": part}, _COLUMNS | _OF_PART[part]))
    return out.getvalue()


def _rows(value: Any, measure: str, where: dict[str, Any], columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of ``value``, whose keys in results.json, joined by dots, are ``measure``."""
    if isinstance(value, dict) and "confidence" in value and "value" in value:
        yield where | {"measure": measure} | value
    elif isinstance(value, dict):
        where = where | {column: value[key] for key, column in columns.items() if key in value}
        for key, inner in value.items():
            if key not in columns:
                yield from _rows(inner, f"{measure}.{key}" if measure else key, where, _COLUMNS)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            entry = where if isinstance(inner, dict) else where | {"index": i}
            yield from _rows(inner, measure, entry, columns)
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield where | {"measure": measure, "value": value}
