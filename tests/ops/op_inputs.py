"""Inputs shared by the op tests: odd shapes, layouts, values per sample, and an independent idea of feasibility."""

import os

import torch
from torch import Tensor

#: Triton's interpreter takes about a millisecond a program: fewer shapes and repetitions there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NORMS = ["linf", "l2", "l1"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: Odd sizes around the vector widths, several ranks, one sample, one element, and a size of many blocks.
SHAPES = [(1, 1), (5,), (3, 7), (2, 3, 5, 5), (4, 3, 11, 13), (2, 67), (1, 3, 32, 32), (2, 5003)]
if INTERPRETED:
    SHAPES = [(1, 1), (5,), (2, 3, 5, 5), (2, 67), (1, 2053)]
#: Element-wise tolerance against float64, relative to 1: half a unit in the last place of x near 1 and a little.
ATOL = {torch.float32: 2.5e-7, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0, spread: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (partly outside ball and box), grad and x0 (inside the unit box)."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=g, dtype=torch.float64)
    x = x0 + spread * torch.randn(shape, generator=g, dtype=torch.float64)
    grad = torch.randn(shape, generator=g, dtype=torch.float64)
    return tuple(t.to(dtype).to(device) for t in (x, grad, x0))  # type: ignore[return-value]


def ulp(x: Tensor) -> Tensor:
    """Unit in the last place of each element, in float64."""
    info = torch.finfo(x.dtype)
    size = x.double().abs().clamp_min(info.smallest_normal)
    return torch.exp2(size.log2().floor()) * info.eps


def overshoot(x: Tensor, x0: Tensor, eps: float, norm: str) -> Tensor:
    """By how much each sample exceeds what METHODS section 6 allows; at most 0 where feasible."""
    d = (x.double() - x0.double()).reshape(len(x), -1).abs()
    slack = (ulp(x) / 2).reshape(len(x), -1) if x.dtype in (torch.float32, torch.float64) else torch.zeros_like(d)
    if norm == "linf":
        return (d - slack).amax(1) - eps * (1 + 1e-6)
    p = 2 if norm == "l2" else 1
    return d.norm(p=p, dim=1) - slack.norm(p=p, dim=1) - eps * (1 + 1e-6)
