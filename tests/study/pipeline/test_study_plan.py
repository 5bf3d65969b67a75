"""A run as commands for a scheduler: independent within a phase, complete, with the results of one process."""

import shlex
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
from rich.console import Console

from fastlip.study.errors import StudyError
from fastlip.study.pipeline import runner
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.plan import phases, write_plan
from fastlip.study.pipeline.stages import stages
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.storage.array_files import read_arrays
from fastlip.study.storage.run_directory import RunDirectory

BEGIN = ["python", "-m", "fastlip.study", "--preset", "demo"]
QUIET = Console(quiet=True)


def only_of(line: str) -> list[str]:
    words = shlex.split(line)
    assert words[: len(BEGIN)] == BEGIN
    assert words[len(BEGIN) :: 2] == ["--only"] * (len(words[len(BEGIN) :]) // 2)
    return words[len(BEGIN) + 1 :: 2]


def test_jobs_have_all_stages_and_depend_on_earlier_phases_alone(finished, micro):
    everything = stages(finished, Inputs(micro, InputPaths()))
    makers = {path: stage.name for stage in everything for path in stage.outputs}
    done: set[str] = set()
    found = phases(everything)
    assert list(found) == ["source", "training", "measurement", "transfer", "results"]
    for jobs in found.values():
        before = set(done)
        for job in jobs:
            mine = [s for s in everything if any(fnmatchcase(s.name, p) for p in job) and s.name not in before]
            assert mine
            for n, stage in enumerate(mine):
                needed = {makers[path] for path in stage.needs}
                assert needed <= before | {s.name for s in mine[:n]}, stage.name
            assert not done & {s.name for s in mine}
            done |= {s.name for s in mine}
    assert done == {stage.name for stage in everything}


def test_planned_jobs_in_any_order_end_where_one_process_does(finished, micro, tmp_path):
    out = tmp_path / "run"
    files = write_plan(micro, InputPaths(), out, BEGIN)
    assert not (out / "config.json").exists()  # the machine that runs decides what "auto" stands for
    for number, file in enumerate(files):
        jobs = [only_of(line) for line in file.read_text().splitlines()]
        if number == 1:  # not before the source is there
            with pytest.raises(StudyError, match="needs what the stage finetune-s0: training makes"):
                runner.run(micro, InputPaths(), out, QUIET, only=["finetune-s0: clean"])
        for job in reversed(jobs):
            runner.run(micro, InputPaths(), out, QUIET, only=job)
        again = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
        runner.run(micro, InputPaths(), out, QUIET, only=jobs[0])  # a job that is done does nothing
        assert again == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert (out / "results.json").read_bytes() == finished.results.read_bytes()
    for path in finished.path.glob("images/*/*.npz"):
        found = read_arrays(out / path.relative_to(finished.path))
        for name, values in read_arrays(path).items():
            assert found[name].tobytes() == values.tobytes()
    assert RunDirectory(out).read_timings().keys() == finished.read_timings().keys()


def test_a_pattern_that_matches_nothing_names_the_stages(finished, micro):
    with pytest.raises(
        StudyError, match=r"--only scratch-s9: \* matches no stage; they are: source: pre-training"
    ) as e:
        runner.run(micro, InputPaths(), finished.path, QUIET, only=["scratch-s9: *"])
    assert e.value.status == 2


def test_the_command_writes_commands_that_run(micro_arguments, tmp_path):
    out = tmp_path / "a run"
    arguments = [*micro_arguments, "--set", "arms=scratch", "--seed", "3"]
    command = [sys.executable, "-m", "fastlip.study", "plan", "--out", str(out), *arguments]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = ["1-training.txt", "2-measurement.txt", "3-transfer.txt", "4-results.txt"]
    assert [file.name for file in sorted((out / "plan").iterdir())] == names
    assert said.splitlines()[0] == f"{out / 'plan' / names[0]}: 1 commands"
    (line,) = (out / "plan" / names[0]).read_text().splitlines()
    words = shlex.split(line)
    assert words[:3] == [sys.executable, "-m", "fastlip.study"]  # which a scheduler's shell need not have activated
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "scratch-s3: training" in done.stdout
    assert RunDirectory(out).checkpoint("scratch-s3").exists()


def test_a_plan_refuses_what_a_run_would_refuse(tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        (["--preset", "demo", "--out", str(tmp_path / "file")], "is a file"),
        (["--preset", "demo", "--out", str(tmp_path)], "holds something that is not a run"),
        (["--out", str(tmp_path / "new")], "name a preset"),
        (
            ["--preset", "quick", "--no-download", "--data", str(tmp_path), "--out", str(tmp_path / "new")],
            "no CIFAR-10",
        ),
    ):
        command = [sys.executable, "-m", "fastlip.study", "plan", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert found.returncode == 2
        assert message in found.stderr, found.stderr
        assert found.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
