"""Several processes that share a run directory carry out each stage once, with the results of a single process."""

import subprocess
import sys
import time

import pytest

from fastlip.study.storage.files import read_json


def started(count, out, arguments):
    """``count`` processes that share the run in ``out``."""
    command = [sys.executable, "-m", "fastlip.study", "--out", str(out), "--join", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, **pipes) for _ in range(count)]


def test_two_joined_processes_end_in_the_same_results(finished, ends_like_it, micro_arguments, tmp_path):
    out = tmp_path / "run"
    processes = started(2, out, micro_arguments)
    said = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    stages = read_json(finished.timings)
    did = [[stage for stage in stages if f"] {stage}: " in text] for text, _ in said]
    assert all(did)  # each took some,
    assert sorted(did[0] + did[1]) == sorted(stages)  # and none was done by both
    ends_like_it(out)


@pytest.mark.slow
def test_two_joined_processes_one_of_them_killed_end_in_the_same_results(ends_like_it, micro_arguments, tmp_path):
    out = tmp_path / "run"
    processes = started(3, out, micro_arguments)
    while not list(out.glob("checkpoints/*.safetensors")):
        time.sleep(0.1)
    processes[0].kill()
    processes[0].communicate()
    said = [p.communicate(timeout=600) for p in processes[1:]]
    assert [p.returncode for p in processes[1:]] == [0, 0], said
    assert any("] " in text for text, _ in said)
    ends_like_it(out)
