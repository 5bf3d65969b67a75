"""SIGKILL at random moments: the same command then ends in the same results."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from fastlip.study.storage.files import read_arrays, read_json


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_ten_times_and_run_again_gives_identical_results(finished, micro_arguments, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastlip.study", "--out", str(out), *micro_arguments]
    whole = sum(read_json(finished.timings).values())
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (out / "config.json").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, whole / 4))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -9), errors
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "results.json").read_bytes() == finished.results.read_bytes()
    for path in finished.path.glob("images/*/*.npz"):
        again = read_arrays(out / path.relative_to(finished.path))
        for name, values in read_arrays(path).items():
            np.testing.assert_array_equal(values, again[name], err_msg=f"{path.name}, {name}")
    assert not list(out.rglob("*.part*"))
