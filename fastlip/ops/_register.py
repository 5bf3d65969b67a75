"""Schemas and implementations of ``torch.ops.fastlip``.

Each device takes the first backend available: the compiled library, Triton (GPU only), plain PyTorch.
``FASTLIP_BACKEND`` (``native``, ``triton`` or ``reference``) forces one, and importing fastlip fails where it cannot be
had: on the CPU, and on the GPU where there is one (Triton: on either). With ``FASTLIP_BACKEND=triton
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

#: A per-sample or per-element value is a float and an optional tensor that overrides it.
_EPS = "float eps, Tensor? eps_tensor"
_BOUNDS = "float lo, Tensor? lo_tensor, float hi, Tensor? hi_tensor"
_STEP = "float step_size, Tensor? step_size_tensor"
#: What the model reads, (x - mean) / std, where it is to be written.
_INPUT = (
    "Tensor({}!)? model_input=None, float mean=0.0, Tensor? mean_tensor=None, float std=1.0, Tensor? std_tensor=None"
)
SCHEMAS = {
    "pgd_step_": f"(Tensor(a!) x, Tensor grad, Tensor x0, {_STEP}, {_EPS}, str norm, {_BOUNDS}, "
    f"float sparsity, Tensor? active, {_INPUT.format('b')}) -> ()",
    "project_": f"(Tensor(a!) x, Tensor x0, {_EPS}, str norm, {_BOUNDS}, Tensor? active) -> ()",
    "random_start": f"(Tensor x0, {_EPS}, str norm, {_BOUNDS}, Tensor ids, Tensor key) -> Tensor",
    "apgd_step_": "(Tensor(a!) x, Tensor grad, Tensor loss, Tensor x0, Tensor(b!) x_prev, Tensor(c!) x_best, "
    "Tensor(d!) grad_best, Tensor(e!) best_loss, Tensor(f!) past_loss, Tensor(g!) step_size, Tensor(h!) counters, "
    f"Tensor schedule, {_EPS}, str norm, {_BOUNDS}, float momentum, float rho, Tensor? active, "
    f"{_INPUT.format('i')}) -> ()",
    "operator_step_": "(Tensor(a!) out, Tensor(b!) out_square, Tensor x, Tensor? x_square, Tensor? previous, "
    "Tensor? previous_square, Tensor weights, Tensor problems, Tensor tiles, Tensor bundles, Tensor entries, "
    "int most_chains, int parts, str products, Tensor? active) -> ()",
    "pack_weights_": "(Tensor(a!) out, Tensor[] weights, int[] groups, bool adjoint) -> ()",
}
#: Operators that run on the CPU alone, natively where the CPU library was built.
HOST_SCHEMAS = {
    "top_eigenpairs": "(Tensor diagonal, Tensor off_diagonal) -> (Tensor, Tensor)",
    "krylov_bound": "(Tensor diagonal, Tensor off_diagonal, Tensor last, Tensor residual, Tensor overlaps, "
    "float tolerance) -> Tensor",
}
BACKENDS = ("native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """What serves one device type, and why."""

    name: str
    reason: str


_library = torch.library.Library("fastlip", "DEF")
for _name, _schema in (SCHEMAS | HOST_SCHEMAS).items():
    _library.define(_name + _schema)


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
    """Load the compiled library and return why it serves, or None where it was not built."""
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
            continue  # interpreted: for tests, when asked for
        if reason := _SERVE[name](device):
            return Backend(name, reason)
    raise AssertionError("the reference serves every device")


#: Backend in use for each device type that this torch supports.
backends = {"cpu": _choose("cpu")}
if torch.version.cuda is not None:
    backends["cuda"] = _choose("cuda")
