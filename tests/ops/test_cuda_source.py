"""The CUDA kernels' source run on the CPU, without a GPU: the op tests on a library made of it.

operator_step_ runs with all its threads, which meet at every barrier, and with plans as for a GPU; the lanes of its
warps exchange what a matrix instruction multiplies. The teams of the other ops have one thread and warps one lane, so
addresses, bounds, tails, decisions and searches are those of the GPU, but not reductions, barriers and clusters. Takes
a C++ compiler and CUDA's headers.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
KERNELS = ("pgd_step", "apgd_step", "random_start", "operator_step", "pack_weights")
COMPILER = shutil.which("g++")
#: Puts the library before the installed one, makes sure of it, and plans as for a small GPU. What runs on the host
#: alone is not in it.
PLUGIN = """
import fastlip, torch
fastlip.__path__.insert(0, {folder!r})
from fastlip import ops
from fastlip.ops import _register, reference
for name in _register.HOST_SCHEMAS:
    _register._library.impl(name, getattr(reference, name), "CPU")
plan = ops.operator_plan

def plan_as_for_a_gpu(*args, tile_columns=64, **options):
    options = {{"merge": True, "part_products": 40 if tile_columns <= 64 else 0}} | options
    return plan(*args, tile_columns=tile_columns, **options)

ops.operator_plan = plan_as_for_a_gpu

def pytest_collection_finish(session):
    assert {folder!r} + "/libfastlip_cpu.so" in torch.ops.loaded_libraries
"""


def cuda_headers() -> Path | None:
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    roots += [Path(nvcc).resolve().parents[1]] if nvcc else []
    found = [root / "include" for root in (*roots, Path("/usr/local/cuda")) if (root / "include/cuda_fp16.h").exists()]
    return found[0] if found else None


def replaced(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text, f"{path.name} has no {old!r} any more"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    headers = cuda_headers()
    if COMPILER is None or headers is None:
        pytest.skip("needs g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("host_cuda")
    shutil.copytree(SOURCES, folder / "csrc")
    kernels, binding = folder / "csrc/kernels/cuda", folder / "csrc/torch/cuda.cpp"
    replaced(kernels / "team.cuh", ("kWarp = 32", "kWarp = 1"))
    for name in ("pgd_step", "apgd_step"):
        shared = "alignas(16) unsigned char shared[1 << 20];\n\ntemplate"
        replaced(
            kernels / f"{name}.cu",
            ("  extern __shared__ __align__(16) unsigned char shared[];\n", ""),
            ("namespace {\n", f"namespace {{\n{shared.removesuffix('template')}"),
        )
    guard = "  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());\n"
    stream = "  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));\n"
    replaced(binding, (guard, ""), (stream, ""), ("(fastlip, CUDA, m)", "(fastlip, CPU, m)"))
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = [f"-I{HERE / 'host_cuda'}", f"-I{folder / 'csrc'}", f"-I{root / 'include'}", f"-I{headers}"]
    objects = []
    for source in (binding, *(kernels / f"{name}.cu" for name in KERNELS)):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [COMPILER, *flags, *include, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=300)
    out = folder / "libfastlip_cpu.so"
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    subprocess.run([COMPILER, "-shared", "-o", str(out), *objects, *libraries], check=True, timeout=300)
    (folder / "host_cuda_plugin.py").write_text(PLUGIN.format(folder=str(folder)))
    return folder


def run_tests(library: Path, names: tuple[str, ...], **variables: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("FASTLIP_BACKEND", "FASTLIP_CPU_ISA", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"} | variables
    tests = [str(HERE / name) + ".py" for name in names]
    options = ["-q", "-p", "host_cuda_plugin", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], env=env, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("shared_bytes", [200_000, 2_000], ids=["staged", "streamed"])
def test_op_tests_pass_on_the_cuda_source(library, shared_bytes):
    """Staged: samples up to 25,000 floats stay on chip; streamed: hardly any does."""
    run_tests(
        library,
        ("test_pgd_ops", "test_apgd_step", "test_random_start", "test_model_input"),
        FASTLIP_HOST_SHARED=str(shared_bytes),
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["up", "down"])
def test_operator_tests_pass_on_the_cuda_source(library, order):
    """Between barriers threads run one after the other: a race shows in one of the orders."""
    run_tests(library, ("test_operator_step", "test_pack_weights", "../norms/test_products"), FASTLIP_HOST_ORDER=order)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_products_are_the_instructions_they_should_be(architecture):
    source = SOURCES / "kernels/cuda/operator_step.cu"
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "--expt-relaxed-constexpr", f"-I{SOURCES}", "-ptx"]
    text = subprocess.run([*command, str(source), "-o", "-"], check=True, capture_output=True, text=True).stdout
    kernels = {name: body for name, body in re.findall(r"\.entry \w*?operator_step_kernelI(\w+)(.*?)\n}", text, re.S)}
    assert len(kernels) == 3
    for name, body in kernels.items():
        # Four tiles of rows, one to four of columns, three products of each.
        assert body.count("mma.sync.aligned.m16n8k8.row.col.f32.tf32") == (120 if "MatrixUnits" in name else 0), name
        assert body.count("tf32") == body.count("mma.sync") * 2, name
        assert "cp.async.cg.shared.global" in body, name
