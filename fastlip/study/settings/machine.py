"""Device, precision, threads and compilation on this machine, which the value "auto" leaves open."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastlip._precision import is_fast
from fastlip.study.errors import StudyError
from fastlip.study.settings.settings import Settings

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """The choices for "auto" on the machine that the run was begun on.

    Attributes:
        device: where the networks run.
        precision: of the matrix products in training.
        threads: CPU threads.
        compiled: whether training compiles the network.
        tf32: whether a GPU may round float32 products to TF32; never in this study, and stated for the reader.
        deterministic: whether a GPU is kept to deterministic algorithms; a CPU has no others here.
    """

    device: str
    precision: Literal["float32", "bfloat16"]
    threads: int
    compiled: bool
    tf32: bool = False
    deterministic: bool = False


def this_machine(settings: Settings) -> Machine:
    """What ``settings`` mean on this machine; torch decides what they leave open."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    fast: Literal["float32", "bfloat16"] = "bfloat16" if is_fast(torch.bfloat16, kind) else "float32"
    return Machine(
        device=device,
        precision=fast if settings.precision == "auto" else settings.precision,
        threads=settings.threads or free_threads(),
        compiled=settings.compile == "on" or (settings.compile == "auto" and kind == "cuda"),
        deterministic=kind == "cuda",
    )


def require_device(name: str) -> None:
    """Raise :class:`StudyError` with status 2 where torch has no device ``name`` here."""
    try:
        kind = "auto" if name == "auto" else torch.device(name).type
    except RuntimeError:
        raise StudyError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N", status=2) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"--device {name}: torch sees no CUDA device here", status=2)


def free_threads() -> int:
    """The threads that torch takes (cores, or OMP_NUM_THREADS), but no more than the CPUs that this process may use."""
    limits = [torch.get_num_threads()]
    if hasattr(os, "sched_getaffinity"):  # Linux
        limits.append(len(os.sched_getaffinity(0)))
    quota = _quota()
    if quota is not None:
        limits.append(max(int(quota), 1))
    return min(limits)


def _quota(process: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> float | None:
    """CPUs that control groups leave this process, of version 2 or of version 1 in a container; None without a limit.

    A group is bound by its own limit and those of the groups around it.
    """
    try:
        own = next(line for line in process.read_text().splitlines() if line.startswith("0::"))
        group = root / own.removeprefix("0::").strip().lstrip("/")
    except (OSError, StopIteration):
        group = root
    limits = []
    for folder in (group, *group.parents):
        if folder.is_relative_to(root):
            limits.append(_ratio(folder / "cpu.max"))
    limits.append(_ratio(root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"))
    return min((limit for limit in limits if limit is not None), default=None)


def _ratio(*files: Path) -> float | None:
    """Quota over period, which stand in one file or in two; None where they do not exist or set no limit."""
    try:
        quota, period = (float(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):  # version 2 has the word "max" for no limit
        return None
    return quota / period if quota > 0 else None
