"""Several processes that share a run directory do each stage once, and end where one would."""

import subprocess
import sys
import time

import numpy as np
import pytest

from fastlip.study.storage.files import read_arrays


@pytest.mark.slow
def test_two_joined_processes_one_of_them_killed_end_in_the_same_results(finished, micro_arguments, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastlip.study", "--out", str(out), "--join", *micro_arguments]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    while not list(out.glob("checkpoints/*.safetensors")):
        time.sleep(0.1)
    processes[0].kill()
    processes[0].communicate()
    said = [p.communicate(timeout=600) for p in processes[1:]]
    assert [p.returncode for p in processes[1:]] == [0, 0], said
    did = [
        line.partition("]")[2].partition(": ")[0] for out_, _ in said for line in out_.splitlines() if line[:1] == "["
    ]
    assert did
    assert (out / "results.json").read_bytes() == finished.results.read_bytes()
    for path in finished.path.glob("images/*/*.npz"):
        again = read_arrays(out / path.relative_to(finished.path))
        for name, values in read_arrays(path).items():
            np.testing.assert_array_equal(values, again[name])
