"""Argument checks of the wrappers of the fused steps, and the memory layout that all operands are brought into."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastlip.ops._schemas import Ball, Saved, StepSize
from fastlip.ops.reference import compute_dtype

Norm = Literal["linf", "l2", "l1"]
PerSample = float | Tensor
Bounds = tuple[PerSample, PerSample]

NORMS = ("linf", "l2", "l1")
_SPELLINGS: dict[str, Norm] = {"linf": "linf", "inf": "linf", "l2": "l2", "2": "l2", "l1": "l1", "1": "l1"}
_ORDERS: dict[float, Norm] = {math.inf: "linf", 2.0: "l2", 1.0: "l1"}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def describe(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def check_tensor(t: Tensor, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {describe(t)}")
    if t.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a scalar")


def check_inputs(x: Tensor, **others: Tensor) -> None:
    check_tensor(x, "x")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x requires grad; fastlip's steps are not differentiable: use torch.no_grad() or x.detach()")
    for name, t in others.items():
        check_like(t, x, name)
    if not torch.compiler.is_compiling() and x.numel() and begin_together(x, others["x0"]):
        raise ValueError("x0 must not share its memory with x, which is changed in place; clone one of them")


def check_like(t: Tensor, x: Tensor, name: str, dtype_of: tuple[Tensor, str] | None = None) -> None:
    """Raise where ``t`` has not the shape, device and dtype of ``x``; its dtype may be that of another tensor."""
    other, other_name = dtype_of or (x, "x")
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {list(x.shape)}, got {list(t.shape)}")
    if t.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")


def check_apart(changed: Tensor, name: str, **others: Tensor) -> None:
    """Raise where what is changed in place begins where another tensor does; tracers' tensors have no place."""
    if torch.compiler.is_compiling() or not changed.numel():
        return
    for other, t in others.items():
        if begin_together(changed, t):
            raise ValueError(f"{name} must not share its memory with {other}")


def begin_together(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at the same place of one storage; calls no operator and reads no memory."""
    same: bool = x.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and bool(x.storage_offset() == other.storage_offset())


def checked_norm(norm: Any) -> Norm:
    """``norm`` by its own name; other libraries' spellings ("Linf", "L2", 2, inf) are taken as well.

    Raises:
        ValueError: the norm is unknown.
    """
    if isinstance(norm, str) and norm.lower() in _SPELLINGS:
        return _SPELLINGS[norm.lower()]
    if isinstance(norm, (int, float)) and not isinstance(norm, bool) and float(norm) in _ORDERS:
        return _ORDERS[float(norm)]
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {str(norm)[:60]!r}")


def per_sample(value: PerSample, x: Tensor, name: str) -> tuple[float, Tensor | None]:
    """``value`` as a float and None, or as 0.0 and a [B] tensor in the dtype of x's arithmetic."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float or a [B] tensor, got {type(value).__name__}")
        return float(value), None
    if value.shape != x.shape[:1] or value.device != x.device:
        raise ValueError(f"{name} must be a float or have shape [{x.shape[0]}] on {x.device}, got {describe(value)}")
    value = value.detach() if value.requires_grad else value
    return 0.0, value.to(compute_dtype(x.dtype)).contiguous()


def checked_step(step_size: PerSample, x: Tensor) -> StepSize:
    """``step_size`` as operators take it."""
    length, lengths = per_sample(step_size, x, "step_size")
    if not math.isfinite(length):
        raise ValueError(f"step_size must be finite, got {length}")
    return StepSize(length, lengths)


def checked_radius(eps: PerSample, x: Tensor) -> tuple[float, Tensor | None]:
    radius, radii = per_sample(eps, x, "eps")
    if not radius >= 0.0:
        raise ValueError(f"eps must be at least 0, got {radius}")
    return radius, radii


def checked_ball(eps: PerSample, norm: str, bounds: Bounds, x: Tensor) -> Ball:
    """Ball and box as operators take them, for an ``x`` whose samples are dense."""
    return Ball(*checked_radius(eps, x), checked_norm(norm), *checked_limits(bounds, x))


def checked_mask(mask: Tensor | None, x: Tensor, name: str = "active") -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor")
    if mask.shape != x.shape[:1] or mask.device != x.device:
        raise ValueError(f"{name} must have shape [{x.shape[0]}] on {x.device}, got {describe(mask)}")
    return mask.contiguous()


def checked_saved(
    best: Tensor | None,
    better: Tensor | None,
    not_finite: Tensor | None,
    layout: Tensor,
    active: Tensor | None,
    **beside: Tensor,
) -> Saved:
    """What a step that reads ``active`` and ``beside`` saves, as operators take it; samples of ``layout`` are dense."""
    if best is None and better is None and not_finite is None:
        return Saved()
    if (best is None) != (better is None):
        raise ValueError("best and better go together")
    if best is not None:
        check_like(best, layout, "best")
        if not same_layout(best, layout) or (len(layout) > 1 and not sample_dense(best)):
            raise ValueError("best must be dense in x's memory layout, because it is changed in place")
        check_apart(best, "best", **beside)
    if not_finite is not None:
        if checked_mask(not_finite, layout, "not_finite") is not not_finite:
            raise ValueError("not_finite must be contiguous, because it is changed in place")
        masks = {"active": active, "better": better}
        check_apart(not_finite, "not_finite", **{name: mask for name, mask in masks.items() if mask is not None})
    return Saved(best, checked_mask(better, layout, "better"), not_finite)


def checked_limits(bounds: Bounds, x: Tensor) -> tuple[float, Tensor | None, float, Tensor | None]:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError("bounds must be a pair (lower, upper)")
    lo, los = per_element(bounds[0], x, "bounds")
    hi, his = per_element(bounds[1], x, "bounds")
    if los is None and his is None and not lo <= hi:
        raise ValueError(f"bounds must satisfy lower <= upper, got ({lo}, {hi})")
    return lo, los, hi, his


def per_element(value: PerSample, x: Tensor, name: str) -> tuple[float, Tensor | None]:
    """``value`` as a float and None, or as 0.0 and a tensor [1 or B, *x.shape[1:]] in x's layout."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be floats or tensors, got {type(value).__name__}")
        return float(value), None
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    value = value.detach().to(compute_dtype(x.dtype))
    vary = value.dim() == x.dim() and value.shape[0] != 1
    try:
        value = value.expand(x.shape if vary else (1, *x.shape[1:]))
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to x's shape {list(x.shape)}, got {list(value.shape)}") from None
    if value.stride()[1:] == x.stride()[1:] and (not vary or value.stride(0) == math.prod(x.shape[1:])):
        return 0.0, value
    return 0.0, torch.empty_strided(value.shape, dense_strides(x), dtype=value.dtype, device=x.device).copy_(value)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x's sample layout with the samples packed."""
    return (math.prod(x.shape[1:]), *x.stride()[1:])


def sample_dense(x: Tensor) -> bool:
    """Whether each sample occupies one gapless block and distinct samples do not overlap."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return x.shape[0] <= 1 or x.stride(0) >= expected


def same_layout(t: Tensor, x: Tensor) -> bool:
    a, b = t.stride(), x.stride()
    return a == b or all(n == 1 or i == j for n, i, j in zip(x.shape[1:], a[1:], b[1:], strict=True))


def in_one_layout(x: Tensor, *others: Tensor) -> list[Tensor]:
    """``x`` with dense samples, and the others in its layout; a tensor that fits already is returned as it is."""
    if not sample_dense(x):
        x = x.contiguous()
    fitted = [x]
    for t in others:
        t = t.detach() if t.requires_grad else t
        if not same_layout(t, x):
            t = torch.empty_strided(t.shape, dense_strides(x), dtype=t.dtype, device=t.device).copy_(t)
        fitted.append(t)
    return fitted


def known_layout(x: Tensor) -> bool:
    """Whether a sample's logical index follows from its memory index: contiguous or channels_last."""
    if x.dim() < 3 or x[:1].is_contiguous():
        return x[:1].is_contiguous()
    last = x[:1].movedim(1, -1)
    return last.is_contiguous()
