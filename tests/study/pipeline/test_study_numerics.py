"""The arithmetic of a run: float32 is float32, a GPU is deterministic, and the caller finds torch as it was."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from fastlip.study.pipeline.numerics import numerics
from fastlip.study.settings.machine import Machine


def state():
    cudnn = torch.backends.cudnn
    return (
        torch.get_num_threads(),
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        cudnn.deterministic,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_tf32_is_off_and_everything_is_put_back(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    machine = Machine("cuda", "float32", 1, False, deterministic=deterministic)
    seen = []
    with contextlib.suppress(KeyboardInterrupt), numerics(machine):
        seen.append((state(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
        raise KeyboardInterrupt
    rest = (True, False, True, True, False) if deterministic else before[3:]
    assert seen == [((1, False, False, *rest), deterministic)]
    assert state() == before


def test_the_environment_is_prepared_before_torch_is_loaded(tmp_path):
    """Idle threads of OpenMP sleep, if the runtime that torch loads is told so in time."""
    (tmp_path / "torch.py").write_text("import os; raise SystemExit(os.environ.get('OMP_WAIT_POLICY', 'unset'))")
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(
        [sys.executable, "-m", "fastlip.study", "report", str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert done.stderr.strip() == "passive"
