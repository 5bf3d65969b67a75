"""Which low precisions a device multiplies faster than float32."""

import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch

Precision = torch.dtype | Literal["auto"] | None

#: Instructions of x86 for each dtype, as torch.cpu.get_capabilities names them.
_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
#: Rows of the matrices on which a CPU is timed.
_SIDE = 256


def precision_for(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The low precision that ``device`` is to compute in, None for float32.

    A precision that was asked for by name but is slower than float32 on this machine is not used, with a warning.
    "auto" is bfloat16 where that is fast.
    """
    if precision == "auto":
        return torch.bfloat16 if is_fast(torch.bfloat16, device.type) else None
    if isinstance(precision, torch.dtype) and not is_fast(precision, device.type):
        _warn(precision, device.type)
        return None
    return precision


@cache
def is_fast(dtype: torch.dtype, device: str) -> bool:
    """Whether a device multiplies ``dtype`` faster than float32.

    An x86 CPU without instructions for the dtype does not: it is slower by an order of magnitude. Any other CPU is
    timed on a matrix product, because PyTorch's build or environment may keep it from using the instructions it has.
    """
    if device == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") == "x86_64" and not any(capabilities.get(i) for i in _INSTRUCTIONS[dtype]):
        return False
    matrix = torch.ones(_SIDE, _SIDE, dtype=torch.float32, device="cpu")
    low, wide = least_seconds([partial(torch.mm, m, m) for m in (matrix.to(dtype), matrix)], rounds=5)
    return low < wide


def least_seconds(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """The least time that each function takes, in turns, after a first round that does not count."""
    seconds = [float("inf")] * len(runs)
    for turn in range(rounds + 1):
        for i, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            if turn:
                seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return seconds


@cache
def _warn(precision: torch.dtype, device: str) -> None:
    kind = {"cpu": "CPU", "cuda": "GPU"}.get(device, device)
    warnings.warn(
        f"precision={precision} is slower than float32 on this {kind}: gradients are followed in float32", stacklevel=2
    )
