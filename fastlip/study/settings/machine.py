"""Device, precision, threads and compilation on this machine, which the value "auto" leaves open."""

from dataclasses import dataclass
from typing import Literal

import torch

from fastlip.study.errors import StudyError
from fastlip.study.settings.settings import Settings


@dataclass(frozen=True)
class Machine:
    """The choices for "auto" on the machine that the run was begun on."""

    device: str
    precision: Literal["float32", "bfloat16"]
    threads: int
    compiled: bool


def this_machine(settings: Settings) -> Machine:
    """What ``settings`` mean on this machine; torch decides what they leave open."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    fast: Literal["float32", "bfloat16"] = "bfloat16" if _fast_bfloat16(torch.device(device)) else "float32"
    return Machine(
        device=device,
        precision=fast if settings.precision == "auto" else settings.precision,
        threads=settings.threads or torch.get_num_threads(),
        compiled=settings.compile == "on" or (settings.compile == "auto" and torch.device(device).type == "cuda"),
    )


def require_device(name: str) -> None:
    """Raise :class:`StudyError` with status 2 where torch has no device ``name`` here."""
    try:
        kind = "auto" if name == "auto" else torch.device(name).type
    except RuntimeError:
        raise StudyError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N", status=2) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"--device {name}: torch sees no CUDA device here", status=2)


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices; emulation is several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
