"""Write the documentation's tables of the study from its committed results; ``--check`` only compares."""

import json
import sys
from pathlib import Path

from fastlip.study.report.summary_tables import seed_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "study-results.md"
RESULTS = ROOT / "benchmarks" / "results" / "study"
#: What is shown of each run, by the name of its folder.
TABLES = {"quick": seed_table, "efficientnet_lite0": seed_table, "seeds": seed_table}


def rewritten(text: str, run: str, table: str) -> str:
    """``text`` with ``table`` between the markers of a run."""
    start, end = f"<!-- {run} table -->", f"<!-- /{run} table -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE.name} must hold {start} and then {end}")
    return f"{before}{start}\n\n{table}\n{end}{after}"


def main() -> None:
    new = text = PAGE.read_text()
    for run, table in TABLES.items():
        results = json.loads((RESULTS / run / "results.json").read_text())
        new = rewritten(new, run, table(results).markdown())
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit(f"{PAGE.name} differs from {RESULTS.relative_to(ROOT)}: run python {sys.argv[0]}")
    else:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
