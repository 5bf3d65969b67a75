"""Which GPU architectures a build is for, by cmake/CudaArchitectures.cmake with a feigned driver and compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CMAKE = shutil.which("cmake")
MODULE = Path(__file__).resolve().parents[2] / "cmake" / "CudaArchitectures.cmake"
ALL = "80-real;90"

pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not on PATH")


def answer(folder, call, path=""):
    """What a CMake function leaves in its first argument."""
    script = folder / "script.cmake"
    script.write_text(f'cmake_minimum_required(VERSION 3.24)\ninclude("{MODULE}")\n{call}\nmessage("got ${{got}}.")\n')
    done = subprocess.run([CMAKE, "-P", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().removeprefix("got ").removesuffix(".")


def program(path, output, status=0):
    path.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {status}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("driver", "wanted"),
    [
        ("9.0\\n", "90-real"),
        ("8.0\\n8.0\\n", "80-real"),
        ("8.6\\n9.0\\n", "86-real;90-real"),
        ("7.5\\n", ALL),  # too old for the kernels
        ("9.0\\n7.5\\n", ALL),
        ("12.1\\n", ALL),  # this nvcc does not know it
        ("NVIDIA-SMI has failed\\n", ALL),
        ("", ALL),
    ],
)
def test_auto_is_what_the_driver_names_and_the_compiler_knows(tmp_path, driver, wanted):
    program(tmp_path / "nvcc", "sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_120\\n")
    program(tmp_path / "nvidia-smi", driver, status=0 if driver else 9)
    path = str(tmp_path)
    assert answer(tmp_path, f'fastlip_cuda_architectures(got "{tmp_path / "nvcc"}")', path) == wanted


@pytest.mark.parametrize(
    ("driver", "wanted"),
    [("9.0\\n", "9.0"), ("8.6\\n8.6\\n12.0\\n", "8.6;12.0"), ("NVIDIA-SMI has failed\\n", ""), ("", "")],
)
def test_gpus_at_hand_are_those_that_the_driver_names(tmp_path, driver, wanted):
    program(tmp_path / "nvidia-smi", driver, status=0 if driver else 9)
    assert answer(tmp_path, "fastlip_gpus(got)", str(tmp_path)) == wanted


def test_there_is_no_gpu_without_a_driver(tmp_path):
    assert answer(tmp_path, "fastlip_gpus(got)", str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("architectures", "wanted"),
    [
        (ALL, "--generate-code=arch=compute_80,code=[sm_80,sm_90,compute_80]"),
        ("90-real;86-real", "--generate-code=arch=compute_86,code=[sm_90,sm_86]"),
        ("100;90-virtual", "--generate-code=arch=compute_90,code=[sm_100,compute_90]"),
        ("90", ""),
        ("90a-real;80", ""),  # the PTX of 80 is not for what 90a alone has
        ("native", ""),
    ],
)
def test_sources_compiled_once_are_assembled_for_every_architecture(tmp_path, architectures, wanted):
    assert answer(tmp_path, f'fastlip_compile_once(got "{architectures}")') == wanted
