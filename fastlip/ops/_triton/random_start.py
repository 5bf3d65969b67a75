"""random_start: one program a sample, whose random numbers depend on the key, its id and the element alone."""

# mypy: allow-untyped-defs, allow-incomplete-defs
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlip.ops._triton.elements import (
    arithmetic,
    ball_radius,
    bound_stride,
    finite_or_zero,
    given,
    in_box,
    kernel,
    narrowed,
    on_device,
    or_nothing,
    widened,
)

_LINF, _L2 = tl.constexpr(0), tl.constexpr(1)
_ELEMENTS, _SAMPLE = tl.constexpr(0), tl.constexpr(1)  # second counter word, as in reference.py


@triton.jit
def _words(key_ptr, block, tag: tl.constexpr, id):
    """Four random words for each counter (block, tag, id); Triton's Philox is Salmon's, with ten rounds."""
    zero = block * 0
    return tl.philox(
        tl.load(key_ptr),
        block.to(tl.uint32),
        (zero + tag).to(tl.uint32),
        (zero + id).to(tl.uint32),
        (zero + (id >> 32)).to(tl.uint32),
    )


@triton.jit
def _integer(words, LANE: tl.constexpr, WIDE: tl.constexpr):
    """A lane's uniform integer: one word's 24 high bits, or 53 bits of two words."""
    if WIDE:
        return ((words[2 * LANE] >> 5).to(tl.int64) << 26) | (words[2 * LANE + 1] >> 6).to(tl.int64)
    else:
        return (words[LANE] >> 8).to(tl.int64)


@triton.jit
def _draw(words, LANE: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr):
    """A lane's number: uniform in [-1, 1) for linf; in float64 a Gaussian for l2, a signed exponential for l1."""
    HALF: tl.constexpr = 2**52 if WIDE else 2**23
    UNIT: tl.constexpr = 2.0**-53 if WIDE else 2.0**-24
    if NORM == "linf":
        return (_integer(words, LANE, WIDE) - HALF).to(tl.float64) * (2 * UNIT)
    elif NORM == "l1":
        size = -tl.log((_integer(words, LANE, WIDE).to(tl.float64) + 0.5) * UNIT)
        sign = words[2 * LANE + 1 if WIDE else LANE] & 1
        return tl.where(sign == 1, -size, size)
    else:
        length = tl.sqrt(-2 * tl.log((_integer(words, LANE - LANE % 2, WIDE).to(tl.float64) + 0.5) * UNIT))
        angle = _integer(words, LANE - LANE % 2 + 1, WIDE).to(tl.float64) * (UNIT * 6.283185307179586)
        if LANE % 2 == 0:
            return length * tl.cos(angle)
        else:
            return length * tl.sin(angle)


@triton.jit
def _place(out_ptr, x0_ptr, radius, unit, lo, lo_ptr, hi, hi_ptr, element, size, channels, T: tl.constexpr):
    """Write x0 + radius * unit, in the box, for the logical elements given."""
    mask = element < size
    plane = size // channels
    at = element % plane * channels + element // plane
    x0 = widened(tl.load(x0_ptr + at, mask, other=0.0), T)
    value = in_box(x0 + radius * unit.to(T), lo, lo_ptr, 0, hi, hi_ptr, 0, at, mask, False, T)
    tl.store(out_ptr + at, narrowed(value, x0, out_ptr.dtype.element_ty), mask)


@triton.jit
def _start(
    out_ptr,
    x0_ptr,
    eps,
    eps_ptr,
    lo,
    lo_ptr,
    hi,
    hi_ptr,
    ids_ptr,
    key_ptr,
    size,
    channels,
    out_stride,
    x0_stride,
    lo_stride,
    hi_stride,
    NORM: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDE: tl.constexpr = T == tl.float64
    LANES: tl.constexpr = 2 if WIDE else 4
    blocks = (size + LANES - 1) // LANES
    sample = tl.program_id(0).to(tl.int64)
    id = tl.load(ids_ptr + sample)
    out_ptr += sample * out_stride
    x0_ptr += sample * x0_stride
    if given(lo_ptr):
        lo_ptr += sample * lo_stride
    if given(hi_ptr):
        hi_ptr += sample * hi_stride
    radius = finite_or_zero(ball_radius(eps, eps_ptr, sample, T))
    if NORM != "linf":
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            words = _words(key_ptr, block, _ELEMENTS, id)
            for lane in tl.static_range(LANES):
                unit = tl.where(block * LANES + lane < size, _draw(words, lane, NORM, WIDE), 0.0)
                sums += unit * unit if NORM == "l2" else tl.abs(unit)
        total = tl.sum(sums)
        first = _integer(_words(key_ptr, tl.arange(0, 1), _SAMPLE, id), 0, WIDE)
        log_once = tl.sum(tl.log((first.to(tl.float64) + 0.5) * (2.0**-53 if WIDE else 2.0**-24)))
        if NORM == "l2":
            scale = tl.where(total > 0, tl.exp(log_once / size) / tl.sqrt(tl.where(total > 0, total, 1.0)), 0.0)
        else:
            scale = 1 / (total - log_once)
        radius = (radius.to(tl.float64) * scale).to(T)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        words = _words(key_ptr, block, _ELEMENTS, id)
        for lane in tl.static_range(LANES):
            unit = _draw(words, lane, NORM, WIDE)
            element = block * LANES + lane
            _place(out_ptr, x0_ptr, radius, unit, lo, lo_ptr, hi, hi_ptr, element, size, channels, T)


@kernel
def _random_start_kernel(
    out_ptr,
    x0_ptr,
    eps: tl.float64,
    eps_ptr,
    lo: tl.float64,
    lo_ptr,
    hi: tl.float64,
    hi_ptr,
    ids_ptr,
    key_ptr,
    size,
    channels,
    out_stride: tl.int64,
    x0_stride: tl.int64,
    lo_stride: tl.int64,
    hi_stride: tl.int64,
    norm,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if norm == _LINF:
        _start(
            out_ptr, x0_ptr, eps, eps_ptr, lo, lo_ptr, hi, hi_ptr, ids_ptr, key_ptr, size, channels, out_stride,
            x0_stride, lo_stride, hi_stride, "linf", T, BLOCK,
        )  # fmt: skip
    elif norm == _L2:
        _start(
            out_ptr, x0_ptr, eps, eps_ptr, lo, lo_ptr, hi, hi_ptr, ids_ptr, key_ptr, size, channels, out_stride,
            x0_stride, lo_stride, hi_stride, "l2", T, BLOCK,
        )  # fmt: skip
    else:
        _start(
            out_ptr, x0_ptr, eps, eps_ptr, lo, lo_ptr, hi, hi_ptr, ids_ptr, key_ptr, size, channels, out_stride,
            x0_stride, lo_stride, hi_stride, "l1", T, BLOCK,
        )  # fmt: skip


def random_start(
    x0: Tensor,  # [B, ...]
    eps: float,
    eps_tensor: Tensor | None,  # [B]
    norm: str,
    lo: float,
    lo_tensor: Tensor | None,  # [1 or B, ...]
    hi: float,
    hi_tensor: Tensor | None,  # [1 or B, ...]
    ids: Tensor,  # [B] int64
    key: Tensor,  # [1] int64
) -> Tensor:
    out = torch.empty_like(x0)
    if x0.numel() == 0:
        return out
    size = math.prod(x0.shape[1:])
    channels_last = x0.dim() > 2 and not x0[:1].is_contiguous()
    with on_device(x0):
        _random_start_kernel[(x0.shape[0],)](
            out,
            x0,
            *or_nothing(x0, eps, eps_tensor, lo, lo_tensor, hi, hi_tensor),
            ids,
            key,
            size,
            x0.shape[1] if channels_last else 1,
            out.stride(0),
            x0.stride(0),
            bound_stride(lo_tensor),
            bound_stride(hi_tensor),
            {"linf": _LINF.value, "l2": _L2.value}.get(norm, 2),
            T=arithmetic(x0),
            BLOCK=256,
            enable_fp_fusion=False,  # x0 + radius * unit rounds twice on every backend
        )
    return out
