"""The documentation's table and figures of the study, and the README's, are those of the committed results."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_headline_table_follows_from_the_committed_results():
    script = ROOT / "benchmarks" / "study_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_figures_beside_it_follow_from_the_committed_results():
    text = " ".join((ROOT / "docs" / "study-results.md").read_text().split())
    results = json.loads((ROOT / "benchmarks" / "results" / "study" / "quick" / "results.json").read_text())

    def short(value: float) -> str:
        return f"{value:.3f}".removeprefix("0")

    readme = " ".join((ROOT / "README.md").read_text().split())
    large = [m for m in results["models"] if m["role"] != "reference"]
    for ratio in (m["ratio_median"] for m in large):
        assert f"{short(ratio['value'])} [{short(ratio['low'])}, {short(ratio['high'])}], n = {ratio['n']}" in text
        assert f"{short(ratio['value'])} [{short(ratio['low'])}, {short(ratio['high'])}], n = {ratio['n']}" in readme
    for row in results["transfer"]:
        if (
            row["strength"] == 1.0
            and row["source"] != row["target"]
            and {row["source"], row["target"]} <= {m["name"] for m in large}
        ):
            assert f"{row['fooled']['k']} of {row['fooled']['n']}" in text
            assert row["noise"]["k"] == 0  # "Gaussian noise of the same norm none"
    assert {v["verdict"] for v in results["verdicts"]} == {"undetermined"}
    config = json.loads((ROOT / "benchmarks" / "results" / "study" / "quick" / "config.json").read_text())
    for row in (row for row in config["power"] if row["question"] == 1):
        assert f"“{row['expected']}”" in text
        assert f" {row['probability']:.3g} ".replace(" 0.", " .") in text
