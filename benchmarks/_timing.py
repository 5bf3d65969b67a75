"""Timing shared by the benchmarks: warm medians with percentiles, on CPU and GPU, and the machine's description."""

import csv
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastlip


def times(
    run: Callable[[], Any],
    *,
    setup: Callable[[], Any] = lambda: None,
    seconds: float = 1.0,
    least: int = 15,
    warm: int = 3,
    flush: torch.Tensor | None = None,
) -> list[float]:
    """Milliseconds of each of at least ``least`` repetitions, after ``warm`` that do not count.

    ``setup`` runs before each, outside the time; ``flush`` (GPU) is overwritten before each to empty the L2.
    """
    for _ in range(warm):
        setup()
        run()
    out: list[float] = []
    stop = time.perf_counter() + seconds
    while len(out) < least or time.perf_counter() < stop:
        setup()
        if flush is not None:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            out.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            out.append((time.perf_counter() - begin) * 1e3)
    return out


def percentiles(ms: list[float]) -> tuple[float, float, float]:
    """Return the median, the 20th and the 80th percentile."""
    low, mid, high = (
        torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )
    return mid, low, high


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's model name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


@cache
def driver_version() -> str:
    """Return the GPU driver's version as nvidia-smi gives it; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    out = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    return out.split("\n", 1)[0].strip()


def environment(device: str) -> dict[str, str]:
    """Columns that every row of a results file carries; on a GPU also the driver and CUDA versions."""
    info = fastlip.build_info()
    gpu = {"driver": driver_version(), "cuda": str(torch.version.cuda)} if device == "cuda" else {}
    return {
        "device": device_name(device),
        "isa": info.cpu_isa or "" if device == "cpu" else f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}",
        "backend": info.backends[device].name,
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "torch": torch.__version__,
        "fastlip": info.version,
    } | gpu


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with a header; numbers keep four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
