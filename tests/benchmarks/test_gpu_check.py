"""The check on a GPU: a few cases of each test in which everything occurs, and a script that says how it is used."""

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from fastlip.study.settings import overrides, presets

REPOSITORY = Path(__file__).parents[2]
TEST = "tests/ops/test_random_start.py::test_matches_reference"


def collected(*options: str) -> list[tuple[str, ...]]:
    """The values of the parameters of each case that would run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options, TEST]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    ids = [line.removeprefix(f"{TEST}[").removesuffix("]") for line in said.splitlines() if line.startswith(TEST)]
    return [tuple(case.split("-")) for case in ids]


@pytest.mark.parametrize("together", [1, 2])
def test_few_cases_have_all_combinations_of_values(together):
    def occurring(cases):
        return {chosen for case in cases for chosen in combinations(enumerate(case), together)}

    everything, few = collected(), collected("--cover", str(together))
    assert set(few) < set(everything)
    assert len(few) <= len(everything) // 2
    assert occurring(few) == occurring(everything)


def test_the_script_says_how_it_is_used():
    script = REPOSITORY / "benchmarks/gpu_check.sh"
    found = subprocess.run(["bash", str(script), "third"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "gpu_check.sh first" in found.stderr
    assert "gpu_check.sh second" in found.stderr


def test_the_study_has_the_settings_that_the_script_changes():
    assignments = re.findall(r"--set ([^\s)]+)", (REPOSITORY / "benchmarks/gpu_check.sh").read_text())
    assert assignments
    overrides.override(presets.preset("full"), assignments)


def test_a_wheel_that_is_not_there_is_named(tmp_path):
    script = REPOSITORY / "benchmarks/gpu_check.sh"
    for variable in ("WHEEL", "OLD_WHEEL"):
        env = {"PATH": "/usr/bin:/bin", variable: "missing.whl", "OUT": str(tmp_path / "out")}
        found = subprocess.run(["bash", str(script), "first"], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert found.returncode == 2
        assert found.stderr == "error: no wheel missing.whl\n"
    assert not list(tmp_path.iterdir())
