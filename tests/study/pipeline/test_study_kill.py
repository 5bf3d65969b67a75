"""SIGKILL at random moments: the same command then ends in the same results."""

import random
import re
import subprocess
import sys
import time

import pytest

from fastlip.study.storage.files import read_json


def started(out, arguments):
    """The command that runs the study in ``out``, as a process that has written its configuration or has ended."""
    command = [sys.executable, "-m", "fastlip.study", "--out", str(out), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "config.json").exists() and process.poll() is None:
        time.sleep(0.05)
    return process


def test_killed_once_and_run_again_gives_identical_results(finished, ends_like_it, micro_arguments, tmp_path):
    out = tmp_path / "run"
    seconds = list(read_json(finished.timings).values())
    chance = random.Random()  # another moment each time: during any stage but the last two
    stages = chance.randrange(len(seconds) - 2)
    pause = chance.uniform(0, seconds[stages])
    print(f"killed {pause:.3f} s after {stages} stages")
    process = started(out, micro_arguments)
    while stages and process.poll() is None:
        if (out / "timings.json").exists() and len(read_json(out / "timings.json")) >= stages:
            break
        time.sleep(0.02)
    time.sleep(pause)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -9, errors
    again = started(out, micro_arguments)
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    resumed = re.search(r"resuming .*: (\d+) of (\d+) stages are done", said)
    assert int(resumed[1] if resumed else 0) >= stages, said
    ends_like_it(out)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_ten_times_and_run_again_gives_identical_results(finished, ends_like_it, micro_arguments, tmp_path):
    out = tmp_path / "run"
    whole = sum(read_json(finished.timings).values())
    chance = random.Random(0)
    for _ in range(10):
        process = started(out, micro_arguments)
        time.sleep(chance.uniform(0, whole / 4))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -9), errors
    done = started(out, micro_arguments)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    ends_like_it(out)
