"""The README's headline table is the one of the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_headline_table_follows_from_the_committed_results():
    script = ROOT / "benchmarks" / "study_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
