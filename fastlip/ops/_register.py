"""Implementations of ``torch.ops.fastlip``, chosen when fastlip is imported.

Each device gets the first backend available: the compiled library, Triton (GPU only), plain PyTorch.
``FASTLIP_BACKEND`` (``native``, ``triton`` or ``reference``) forces one, and importing fastlip fails where the forced
one is unavailable on the CPU, or on the GPU if there is one (for Triton: on both). With ``FASTLIP_BACKEND=triton
TRITON_INTERPRET=1`` the Triton kernels run on CPU tensors, which is how they are tested without a GPU.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

import fastlip
from fastlip.ops._schemas import HOST_SCHEMAS, SCHEMAS

BACKENDS = ("native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """The backend that serves a device type, and the reason why it does."""

    name: str
    reason: str


_library = torch.library.Library("fastlip", "DEF")
for _name, _schema in (SCHEMAS | HOST_SCHEMAS).items():
    _library.define(_name + _schema)
# Logits are taken as a constant, and need not be detached in every call.
_library.impl("judge", torch.library.fallthrough_kernel, "Autograd")


def library_path(device: str) -> Path | None:
    """Return the compiled library for ``device`` ("cpu" or "cuda"), or None where it was not built."""
    for folder in fastlip.__path__:
        path = Path(folder) / f"libfastlip_{device}.so"
        if path.exists():
            return path
    return None


def _implement(device: str, module: ModuleType) -> None:
    from fastlip.ops import reference

    for name in SCHEMAS:
        _library.impl(name, getattr(module, name), device.upper())
    if device == "cpu":
        for name in HOST_SCHEMAS:
            _library.impl(name, getattr(reference, name), "CPU")


def _triton_serves(device: str) -> bool:
    return find_spec("triton") is not None and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _native(device: str) -> str | None:
    """Load the compiled library and return the reason why it serves, or None where it was not built."""
    library = library_path(device)
    if library is None:
        return None
    if device == "cpu":
        from fastlip import _native

        _native.cpu_isa()  # a FASTLIP_CPU_ISA that this CPU or build lacks is an error here, not in a kernel
    torch.ops.load_library(library)
    return f"{library.name} is installed"


def _triton(device: str) -> str | None:
    if find_spec("triton") is None or (device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        return None
    from fastlip.ops import triton_kernels

    _implement(device, triton_kernels)
    return "interpreted" if device == "cpu" else f"libfastlip_{device}.so was not built"


def _reference(device: str) -> str | None:
    from fastlip.ops import reference

    _implement(device, reference)
    return f"libfastlip_{device}.so was not built" + (", triton is not installed" if device == "cuda" else "")


_SERVE: dict[str, Callable[[str], str | None]] = {"native": _native, "triton": _triton, "reference": _reference}
_HINTS = {
    ("native", "cpu"): "libfastlip_cpu.so was not built; reinstall fastlip",
    ("native", "cuda"): "libfastlip_cuda.so was not built; install nvcc and reinstall fastlip with FASTLIP_CUDA=ON",
    ("triton", "cpu"): "there is no GPU for it; set TRITON_INTERPRET=1 to run its kernels on CPU tensors",
    ("triton", "cuda"): "triton is not installed",
}


def _choose(device: str) -> Backend:
    forced = os.environ.get("FASTLIP_BACKEND") or None
    if forced not in (None, *BACKENDS):
        raise ImportError(f"fastlip: FASTLIP_BACKEND={forced} is unknown; choose one of {', '.join(BACKENDS)}")
    if forced:
        if _SERVE[forced](device):
            return Backend(forced, f"forced by FASTLIP_BACKEND={forced}")
        # Triton need not serve the CPU where it serves a GPU, nor the CUDA library a machine without one.
        if (device == "cuda") == torch.cuda.is_available():
            raise ImportError(f"fastlip: FASTLIP_BACKEND={forced} cannot be had: {_HINTS[forced, device]}")
    for name in BACKENDS:
        if name == "triton" and device == "cpu":
            continue  # the interpreter is for tests and has to be forced
        if reason := _SERVE[name](device):
            return Backend(name, reason)
    raise AssertionError("the reference serves every device")


#: Backend in use for each device type that this torch supports.
backends = {"cpu": _choose("cpu")}
if torch.version.cuda is not None:
    backends["cuda"] = _choose("cuda")
