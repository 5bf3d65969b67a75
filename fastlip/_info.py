"""Versions of this installation, and the backend that serves each device."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fastlip
from fastlip.ops import Backend, backends


@dataclass(frozen=True)
class BuildInfo:
    """Versions and backends; ``str()`` gives a table, :meth:`to_dict` plain data."""

    version: str
    torch: str
    backends: dict[str, Backend]
    cpu_isa: str | None = None  # None: the compiled part is missing
    compiled: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of strings, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        compiled = self.compiled
        cuda = (
            f"{compiled['cuda_toolkit']} for {compiled['cuda_architectures']}" if compiled.get("cuda_toolkit") else ""
        )
        rows = [
            ("fastlip", self.version),
            ("torch", f"{self.torch} (built against {compiled.get('torch_built_with', 'none')})"),
            *((f"{device} backend", f"{b.name}: {b.reason}") for device, b in self.backends.items()),
            ("CPU kernels", f"{self.cpu_isa} of {compiled['cpu_isas']}" if self.cpu_isa else "not built"),
            ("CUDA library", cuda or "not built; with nvcc, FASTLIP_CUDA=ON pip install . builds it"),
            ("compiler", compiled.get("compiler", "none")),
        ]
        return "\n".join(f"{name:<13} {value}" for name, value in rows)


def build_info() -> BuildInfo:
    """Return versions, instruction set, CUDA toolkit and the backend in use for each device, and why.

    Example:
        >>> import fastlip
        >>> print(fastlip.build_info())
    """
    try:
        from fastlip import _native
    except ImportError:
        return BuildInfo(fastlip.__version__, torch.__version__, dict(backends))
    return BuildInfo(fastlip.__version__, torch.__version__, dict(backends), _native.cpu_isa(), _native.build_info())
