"""The commands that the study's README gives for schedulers, run on a plan of small commands."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[3] / "fastlip" / "study" / "README.md"

#: Each command notes its name; that of the second file fails while there is something in its way.
STEP = (
    "import pathlib, sys; way = pathlib.Path(sys.argv[2]); way.exists() and sys.exit(way.name); "
    "pathlib.Path(sys.argv[1]).touch()"
)


def block(name: str, run: Path) -> str:
    """A block of code of the README, for the run directory ``run``."""
    found = re.search(rf"<!-- test:{name} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1].replace("RUN", str(run))


def command_of(name: str, run: Path) -> list[str]:
    if name == "submitit":
        pytest.importorskip("submitit")
        return [sys.executable, "-c", block(name, run).replace('cluster="slurm"', 'cluster="local"')]
    if name == "parallel":
        path = shutil.which("parallel")
        if path is None or "GNU" not in subprocess.run([path, "--version"], capture_output=True, text=True).stdout:
            pytest.skip("needs GNU parallel")
    return ["bash", "-c", block(name, run)]


@pytest.mark.parametrize("name", ["parallel", "xargs", "submitit"])
def test_files_run_in_order_and_a_failure_stops_before_the_next(name, tmp_path):
    done, way = tmp_path / "what is done", tmp_path / "in the way"
    done.mkdir()
    (tmp_path / "plan").mkdir()
    files = {"1-source": ["source"], "2-training": ["a: *", "b; exit"], "3-results": ["results"]}
    for number, (file, names) in enumerate(files.items(), 1):
        blocked = way if number == 2 else tmp_path / "nothing"
        commands = [[sys.executable, "-c", STEP, str(done / n), str(blocked)] for n in names]
        (tmp_path / "plan" / f"{file}.txt").write_text("".join(shlex.join(c) + "\n" for c in commands))
    run = command_of(name, tmp_path)
    way.touch()
    failed = subprocess.run(run, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "in the way" in failed.stdout + failed.stderr
    assert [path.name for path in done.iterdir()] == ["source"]
    way.unlink()
    subprocess.run(run, check=True, capture_output=True)
    assert {path.name for path in done.iterdir()} == {"source", "a: *", "b; exit", "results"}
    source, *training, results = (done / n for names in files.values() for n in names)
    assert max(t.stat().st_mtime_ns for t in [source, *training]) <= results.stat().st_mtime_ns
