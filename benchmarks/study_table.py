"""Write the README's headline table from the committed results of the study; ``--check`` only compares."""

import json
import sys
from pathlib import Path

from fastlip.study.tables import seed_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "study" / "quick" / "results.json"
START, END = "<!-- quick table -->", "<!-- /quick table -->"


def rewritten(text: str, table: str) -> str:
    """``text`` with ``table`` between the markers."""
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{README.name} must hold {START} and then {END}")
    return f"{before}{START}\n\n{table}\n{END}{after}"


def main() -> None:
    text = README.read_text()
    new = rewritten(text, seed_table(json.loads(RESULTS.read_text())).markdown())
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit(f"{README.name} differs from {RESULTS.relative_to(ROOT)}: run python {sys.argv[0]}")
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
