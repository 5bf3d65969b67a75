"""Write the documentation's table of the study from its committed results; ``--check`` only compares."""

import json
import sys
from pathlib import Path

from fastlip.study.report.summary_tables import seed_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "study-results.md"
RESULTS = ROOT / "benchmarks" / "results" / "study"
TABLES = {"quick": seed_table}


def rewritten(text: str, preset: str, table: str) -> str:
    """``text`` with ``table`` between the preset's markers."""
    start, end = f"<!-- {preset} table -->", f"<!-- /{preset} table -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE.name} must hold {start} and then {end}")
    return f"{before}{start}\n\n{table}\n{end}{after}"


def main() -> None:
    new = text = PAGE.read_text()
    for preset, table in TABLES.items():
        results = json.loads((RESULTS / preset / "results.json").read_text())
        new = rewritten(new, preset, table(results).markdown())
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit(f"{PAGE.name} differs from {RESULTS.relative_to(ROOT)}: run python {sys.argv[0]}")
    else:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
