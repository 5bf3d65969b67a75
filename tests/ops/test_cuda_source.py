"""The CUDA kernels' source run on the CPU, without a GPU: the op tests on a library made of it.

They run with all their threads, warps of 32 lanes that exchange values, blocks with shared memory and clusters of
blocks that read each other's; plans are as for a GPU. Threads run one after the other, from barrier to barrier, so a
missing barrier shows, but not the memory model's subtleties. Takes a C++ compiler and CUDA's headers.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
KERNELS = ("pgd_step", "apgd_step", "random_start", "operator_step", "pack_weights", "judge")
COMPILER = shutil.which("g++")
CHOICES = ("FASTLIP_BACKEND", "FASTLIP_CPU_ISA", "TRITON_INTERPRET")
pytestmark = pytest.mark.skipif(any(map(os.environ.get, CHOICES)), reason="the same whichever backend is chosen")
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


def headers_of_wheels() -> list[Path]:
    """Of those that a CUDA build of torch brings; what they lack is in `not_in_wheels`."""
    return [path.parent for folder in sys.path for path in Path(folder).glob("nvidia/*/include/cuda_fp16.h")]


def cuda_headers(toolkit: Path = Path("/usr/local/cuda")) -> Path | None:
    """A toolkit's, else of wheels."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    roots += [Path(nvcc).resolve().parents[1]] if nvcc else []
    found = [root / "include" for root in (*roots, toolkit) if (root / "include/cuda_fp16.h").exists()]
    return (found or headers_of_wheels() or [None])[0]


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "nvcc", "toolkit", "wheel", ""])
def test_headers_are_found(tmp_path, monkeypatch, place):
    """In each place, if in no other; folders without them are passed over."""
    at = {"nvcc": "found", "wheel": "site/nvidia/cu13"}
    for other in ("CUDA_HOME", "CUDA_PATH", "found", "toolkit", "site/nvidia/cu13"):
        (tmp_path / other / "include").mkdir(parents=True)
    root = tmp_path / at.get(place, place)
    if place:
        (root / "include/cuda_fp16.h").touch()
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / "found/bin" / name))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), str(tmp_path / "site")])
    assert cuda_headers(tmp_path / "toolkit") == (root / "include" if place else None)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_headers_of_wheels_are_enough(tmp_path):
    """Tried here, too, where a toolkit comes first."""
    found = headers_of_wheels()
    if not found:
        pytest.skip("needs `pip install nvidia-cuda-runtime`")
    (tmp_path / "main.cpp").write_text("""
#include <cuda_runtime.h>
int main() {
  const bool half = __half2float(__float2half(0.1f)) == 0.0999755859375f;
  return half && __bfloat162float(__float2bfloat16(0.1f)) == 0.10009765625f ? 0 : 1;
}
""")
    program = tmp_path / "main"
    include = [f"-I{HERE / 'host_cuda'}", f"-I{found[0]}", "-idirafter", str(HERE / "host_cuda/not_in_wheels")]
    command = [COMPILER, "-std=c++20", "-w", *include, str(tmp_path / "main.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    subprocess.run([program], check=True)


def replaced(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text, f"{path.name} has no {old!r} any more"
        text = text.replace(old, new)
    path.write_text(text)


def build(
    folder: Path, headers: Path, changes: Sequence[tuple[str, str, str]] = (), *, only: str = "", rest: Path = Path()
) -> None:
    """Make the library in `folder`.

    changes: file among the kernels, what stands there, what shall stand there. only: the one kernel to compile, the
    others being taken from the library in `rest`.
    """
    shutil.copytree(SOURCES, folder / "csrc")
    kernels, binding = folder / "csrc/kernels/cuda", folder / "csrc/torch/cuda.cpp"
    for name, old, new in changes:
        replaced(kernels / name, (old, new))
    for source in kernels.glob("*.cu"):
        text = source.read_text()
        text, variables = re.subn(r"__shared__ ([\w:<>]+) (\w+);", r"\1& \2 = HostShared::variable<\1>();", text)
        assert variables <= 1, f"{source.name}: HostShared has room for one variable"
        dynamic = "extern __shared__ __align__(16) unsigned char shared[];"
        source.write_text(text.replace(dynamic, "unsigned char* const shared = HostShared::dynamic();"))
    guard = "  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());\n"
    stream = "  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));\n"
    replaced(binding, (guard, ""), (stream, ""), ("(fastlip, CUDA, m)", "(fastlip, CPU, m)"))
    root = Path(torch.__file__).parent
    align = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-static-libubsan"]  # a CPU would not mind
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = [f"-I{HERE / 'host_cuda'}", f"-I{folder / 'csrc'}", f"-I{root / 'include'}", f"-I{headers}"]
    include += ["-idirafter", str(HERE / "host_cuda/not_in_wheels")]
    objects: list[str] = []
    for source in (binding, *(kernels / f"{name}.cu" for name in KERNELS)):
        if only not in ("", source.stem):
            continue
        objects.append(str(folder / f"{source.stem}.o"))
        command = [COMPILER, *flags, *align, *include, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=300)
    if only:  # its own first: of functions that several kernels share, the linker takes the first it sees
        objects += [str(path) for path in sorted(rest.glob("*.o")) if path.stem != only]
    out = folder / "libfastlip_cpu.so"
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    subprocess.run([COMPILER, "-shared", *align, "-o", str(out), *objects, *libraries], check=True, timeout=300)
    (folder / "host_cuda_plugin.py").write_text(PLUGIN.format(folder=str(folder)))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    headers = cuda_headers()
    if COMPILER is None or headers is None:
        pytest.skip("needs g++ and CUDA's headers (from a toolkit or `pip install nvidia-cuda-runtime`)")
    folder = tmp_path_factory.mktemp("host_cuda")
    build(folder, headers)
    return folder


def run_tests(library: Path, names: Sequence[str], *options: str, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in CHOICES}
    env |= {"PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"} | variables
    tests = [str(HERE / name) + ".py" for name in names]
    command = ["-q", "-p", "host_cuda_plugin", "-p", "no:cacheprovider", "-m", "not gpu and not slow", *options, *tests]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *command], env=env, capture_output=True, text=True, timeout=900
    )


def assert_passing(run: subprocess.CompletedProcess) -> None:
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


#: What a sample in L2 or L1 is given: registers, up to 3,072 floats in a block's; without them shared memory, of which
#: a block has 200,000 bytes, a third of it for each of several blocks; or 8,000 and a cluster; or no cluster, so that
#: what is larger is read again in every pass.
REGISTERS = {"FASTLIP_HOST_SHARED": "200000"}
BLOCK = REGISTERS | {"FASTLIP_HOST_THREADS": "0"}
CLUSTER = {"FASTLIP_HOST_SHARED": "8000", "FASTLIP_HOST_THREADS": "0"}
STREAMED = CLUSTER | {"FASTLIP_HOST_CLUSTERS": "0"}
UP, DOWN = {"FASTLIP_HOST_ORDER": "up"}, {"FASTLIP_HOST_ORDER": "down"}
STEPS = ("test_pgd_ops", "test_apgd_step", "test_saved", "test_random_start", "test_model_input")
OPERATORS = ("test_operator_step", "test_pack_weights", "../norms/solvers/test_matmul_precision")
LOSSES = ("test_judge",)
#: What is not slow: all but the largest samples, many repetitions, and what no kernel decides.
SOME = (
    "not 224 and not 8200 and not (large and apgd) and not feasible and not nearest and not published"
    " and not opcheck and not compile and not direct_calls and not argument"
)


@pytest.mark.parametrize(
    ("names", "variables"),
    [(STEPS, BLOCK | DOWN), (STEPS, CLUSTER | UP), (OPERATORS, UP), (LOSSES, DOWN)],
    ids=["block", "cluster", "operators", "losses"],
)
def test_most_op_tests_pass_on_the_cuda_source(library, names, variables):
    assert_passing(run_tests(library, names, "-k", SOME, **variables))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [REGISTERS | UP, BLOCK | DOWN, CLUSTER | UP, STREAMED | DOWN],
    ids=["registers", "block", "cluster", "streamed"],
)
def test_op_tests_pass_on_the_cuda_source(library, variables):
    assert_passing(run_tests(library, STEPS, **variables))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [REGISTERS | DOWN, BLOCK | UP, CLUSTER | DOWN], ids=["registers", "block", "cluster"]
)
def test_a_few_op_tests_pass_in_the_other_order(library, variables):
    """Between barriers threads run one after the other: a race shows in one of the orders."""
    assert_passing(run_tests(library, STEPS, "-k", "match and not large and not 112", **variables))


ENDED, APART = "shared memory of a block that has ended", "at different"
REDUCED, JOINED = "    gather<kPeaks>(memory_.warp[turn_]", "      gather<kPeaks>(memory_.block[turn_]"
#: Faults, by what is taken out: the kernel to compile, the change, what a sample is given, and what is said where it is
#: not a test that fails.
FAULTS = {
    "barrier of a reduction": (
        "pgd_step",
        ("cooperative_group.cuh", "    __syncthreads();\n" + REDUCED, REDUCED),
        BLOCK | UP,
        "",
    ),
    "second set of a block's memory": ("pgd_step", ("cooperative_group.cuh", "turn_ ^= 1;", ""), REGISTERS | UP, ""),
    "second set of a cluster's memory": (
        "pgd_step",
        ("cooperative_group.cuh", "block[turn_]", "block[0]"),
        CLUSTER | UP,
        "",
    ),
    "barrier of a cluster's reduction": (
        "pgd_step",
        ("cooperative_group.cuh", "      sync();\n" + JOINED, JOINED),
        CLUSTER | UP,
        ENDED,  # blocks that add up other numbers search a different number of times
    ),
    "wait for the other blocks to begin": (
        "pgd_step",
        ("cooperative_group.cuh", "      sync();  // no", "      __syncthreads();  // no"),
        CLUSTER | UP,
        "has not begun",
    ),
    "barrier of a count": (
        "pgd_step",
        ("ball_passes.cuh", "    group.sync();  // bins", "    // bins"),
        REGISTERS | UP,
        "",
    ),
    "other blocks' wait for a count": (
        "pgd_step",
        ("ball_passes.cuh", "    group.sync();  // bins", "    __syncthreads();  // bins"),
        CLUSTER | UP,
        "",
    ),
    "barrier of a cluster's count": (
        "pgd_step",
        ("ball_passes.cuh", "        __syncthreads();\n        complete", "        complete"),
        CLUSTER | UP,
        "",
    ),
    "third set of bins": ("pgd_step", ("ball_passes.cuh", "turn == 2 ? 0", "turn == 1 ? 0"), REGISTERS | UP, ""),
    "wait before a sample's numbers change": ("apgd_step", ("apgd_step.cu", "  group.sync();", ""), BLOCK | UP, APART),
    "other blocks' wait before a sample's numbers change": (
        "apgd_step",
        ("apgd_step.cu", "  group.sync();", "  __syncthreads();"),
        CLUSTER | UP,
        ENDED,  # blocks that find other numbers search a different number of times
    ),
    "barrier before the last block writes": (
        "apgd_step",
        ("apgd_step.cu", "  __syncthreads();  // all", "  // all"),
        BLOCK | UP,
        "",
    ),
    "barrier before warps merge what they ranked": (
        "judge",
        ("judge.cu", "    __syncthreads();\n    Ranking", "    Ranking"),
        UP,
        "",
    ),
    "barrier before warps add up": ("judge", ("judge.cu", "    __syncthreads();\n    double", "    double"), UP, ""),
    "what is saved before x moves": (
        "pgd_step",
        (
            "pgd_step.cu",
            "        if (is_better(p, sample)) {",
            "        tile.finish(batch);\n        if (is_better(p, sample)) {",
        ),
        REGISTERS | UP,
        "",
    ),
    "look at a gradient": (
        "pgd_step",
        ("sample_tile.cuh", "if (watched) look_at", "if (false) look_at"),
        BLOCK | UP,
        "",
    ),
    "look at the gradient of a sample that restarts": (
        "apgd_step",
        ("apgd_step.cu", " || (back && p.not_finite != nullptr)", ""),
        CLUSTER | UP,
        "",
    ),
    "best in packs that its address does not allow": (
        "apgd_step",
        ("memory.cuh", "fits(p.best, p.best_stride, storage) && ", ""),
        BLOCK | UP,
        "misaligned",
    ),
    "look at alignment": (
        "pgd_step",
        ("sample_tile.cuh", "wide_(shares.wide)", "wide_(true)"),
        BLOCK | UP,
        "misaligned",
    ),
    "room for what a kernel declares": (
        "pgd_step",
        ("ball_launch.cuh", " - kStatic", ""),
        CLUSTER | UP | {"FASTLIP_HOST_SHARED": "3000"},
        "more shared memory than a block may have",
    ),
}


#: Those that are not slow: of a barrier, of a cluster, and of the size of shared memory.
QUICK = ("barrier of a reduction", "other blocks' wait for a count", "room for what a kernel declares")


@pytest.mark.parametrize(
    "fault", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name not in QUICK)]
)
def test_a_fault_in_a_kernel_is_found(library, tmp_path, fault):
    kernel, change, variables, said = FAULTS[fault]
    build(tmp_path, cuda_headers(), [change], only=kernel, rest=library)
    names = {
        "pgd_step": ("test_pgd_ops", "test_saved"),
        "apgd_step": ("test_apgd_step", "test_saved"),
        "judge": LOSSES,
    }[kernel]
    run = run_tests(
        tmp_path, names, "-x", "--capture=sys", "-k", "(match or stride or layout) and not large", **variables
    )
    assert run.returncode in (1, -signal.SIGABRT)
    assert (said or " failed") in run.stdout + run.stderr, run.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("order", [UP, DOWN], ids=["up", "down"])
def test_other_op_tests_pass_on_the_cuda_source(library, order):
    assert_passing(run_tests(library, (*OPERATORS, *LOSSES), **order))


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
