"""Tests of a file on an instruction set of one's choice, which a process chooses once."""

import os
import subprocess
import sys

import pytest

import fastlip
from fastlip import ops

_ISAS = pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
_NATIVE = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")


def every_isa(test):
    """Give a test each instruction set as ``isa``."""
    return _NATIVE(_ISAS(test))


def run_with_isa(isa: str, file: str, keywords: str) -> None:
    """Run the tests of ``file`` that ``keywords`` choose; skips where this build or this CPU lacks the instructions."""
    if isa not in fastlip.build_info().compiled["cpu_isas"].split(", "):
        pytest.skip("not compiled")
    code = f"import pytest, sys; sys.exit(pytest.main(['-q', '-k', {keywords!r}, {file!r}]))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTLIP_CPU_ISA": isa}, capture_output=True, text=True
    )
    if "is not supported by this CPU" in run.stdout + run.stderr:
        pytest.skip("not supported by this CPU")
    assert run.returncode == 0, run.stdout
