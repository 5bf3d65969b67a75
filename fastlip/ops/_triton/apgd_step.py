"""apgd_step_: a small kernel decides for each sample, then elements move.

"linf" is one pass then. "l2" and "l1" go through the PGD step's kernel (ball.py), "l2" twice, with the point between
the two projections in the arithmetic's dtype.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlip.ops._triton.ball import launch_ball
from fastlip.ops._triton.elements import (
    NO_INPUT,
    arithmetic,
    ball_radius,
    bound_stride,
    clamp,
    elements,
    feed,
    finite_or_zero,
    given,
    gradient,
    in_box,
    input_stride,
    kernel,
    mask_of,
    multiple,
    narrowed,
    nothing,
    on_device,
    or_nothing,
    quotient,
    read_by_model,
    takes_part,
    vectors,
    widened,
)
from fastlip.ops.reference import compute_dtype

_FIRST, _IMPROVED, _RESTART, _SKIP = (tl.constexpr(bit) for bit in (1, 2, 4, 8))
_ITERATION, _INCREASES, _REDUCED, _KEPT, _SUPPORT = (tl.constexpr(i) for i in range(5))
_COUNTERS = tl.constexpr(6)


@kernel
def _decide_kernel(
    decision_ptr,
    loss_ptr,
    x_ptr,
    x0_ptr,
    x_best_ptr,
    best_loss_ptr,
    past_loss_ptr,
    step_size_ptr,
    counters_ptr,
    schedule_ptr,
    eps: tl.float64,
    eps_ptr,
    rho: tl.float64,
    active_ptr,
    steps,
    size,
    x_stride: tl.int64,
    x0_stride: tl.int64,
    x_best_stride: tl.int64,
    l1,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring the sample's numbers up to date, and say what its elements are to do: bits, as named above."""
    sample = tl.program_id(0).to(tl.int64)
    on = takes_part(active_ptr, sample)
    counters_ptr += sample * _COUNTERS
    loss = tl.load(loss_ptr + sample)
    loss = tl.where(loss == loss, loss, float("-inf"))
    best = tl.load(best_loss_ptr + sample)
    last = tl.load(past_loss_ptr + 2 * sample)
    checked = tl.load(past_loss_ptr + 2 * sample + 1)
    step = tl.load(step_size_ptr + sample)
    iteration = tl.load(counters_ptr + _ITERATION)
    increases = tl.load(counters_ptr + _INCREASES)
    reduced = tl.load(counters_ptr + _REDUCED)

    first = iteration == 0
    improved = first | (loss > best)
    best = tl.where(improved, loss, best)
    checked = tl.where(first, loss, checked)
    increases += ((loss > last) & (iteration != 0)).to(tl.int32)
    scheduled = (iteration > 0) & (iteration < steps)
    window = tl.load(schedule_ptr + iteration, scheduled, other=0)
    check = window > 0
    if l1:
        supports = tl.zeros((BLOCK,), tl.int32)
        extent = tl.where(check & on, size, 0)
        for start in range(0, extent, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < extent
            x0 = widened(tl.load(x0_ptr + sample * x0_stride + at, mask, other=0.0), T)
            here = widened(tl.load(x_ptr + sample * x_stride + at, at < _extent(extent, improved), other=0.0), T)
            there = widened(
                tl.load(x_best_ptr + sample * x_best_stride + at, at < extent - _extent(extent, improved), other=0.0), T
            )
            top = tl.where(improved, here, there)
            supports += (mask & (top != x0)).to(tl.int32)
        support = tl.sum(supports)
        before = tl.load(counters_ptr + _SUPPORT)
        restart = check & (support.to(tl.float64) < 0.95 * before.to(tl.float64))
        radius = ball_radius(eps, eps_ptr, sample, T)
        least = quotient(radius, tl.full((), 10.0, T), T)
        following = tl.where(restart, radius, tl.maximum(quotient(step, tl.full((), 1.5, T), T), least))
        tl.store(counters_ptr + _KEPT, ((2 * support.to(tl.int64) + 2) // 3).to(tl.int32), check & on)
        tl.store(counters_ptr + _SUPPORT, support, check & on)
    else:
        stuck = (reduced == 0) & (best == checked)
        restart = check & ((increases.to(tl.float64) < rho * window.to(tl.float64)) | stuck)
        following = tl.where(restart, step * 0.5, step)
    tl.store(best_loss_ptr + sample, best, on)
    tl.store(past_loss_ptr + 2 * sample, tl.where(restart, best, loss), on)
    tl.store(past_loss_ptr + 2 * sample + 1, tl.where(check, best, checked), on)
    tl.store(step_size_ptr + sample, following.to(T), check & on)
    tl.store(counters_ptr + _ITERATION, iteration + 1, on)
    tl.store(counters_ptr + _INCREASES, tl.where(check, 0, increases), on)
    tl.store(counters_ptr + _REDUCED, restart.to(tl.int32), check & on)
    bits = tl.where(first, _FIRST, 0) | tl.where(improved, _IMPROVED, 0) | tl.where(restart, _RESTART, 0)
    tl.store(decision_ptr + sample, tl.where(on, bits, _SKIP))


@triton.jit
def _extent(size, flag):
    """``size`` where ``flag``, else 0: what an element's index is compared with."""
    return tl.where(flag, size, 0)


@triton.jit
def _origin(x_ptr, best_ptr, at, size, decision):
    """What lies at ``x_ptr``, or at ``best_ptr`` where the sample restarts from an earlier iterate."""
    how = decision & (_RESTART | _IMPROVED)
    here = tl.load(x_ptr, at < _extent(size, how != _RESTART), other=0.0)
    there = tl.load(best_ptr, at < _extent(size, how == _RESTART), other=0.0)
    return tl.where(how == _RESTART, there, here)


@triton.jit
def _ascent(
    grad_ptr, best_ptr, std, std_ptr, at, size, decision, FED: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr
):
    """Likewise of gradients: in storage's dtype, or with respect to x where that is not what lies at ``grad_ptr``."""
    how = decision & (_RESTART | _IMPROVED)
    mask = at < _extent(size, how != _RESTART)
    if FED:
        here = gradient(grad_ptr, std, std_ptr, at, mask, FED, ALIGNED, T)
    else:
        here = tl.load(elements(grad_ptr, at, ALIGNED), mask, other=0.0)
    there = tl.load(best_ptr, at < _extent(size, how == _RESTART), other=0.0)
    return tl.where(how == _RESTART, there, here)


@triton.jit
def _heavy_ball(x, z, last, momentum, rest):
    return (x + (z - x) * momentum) + (x - last) * rest


@kernel
def _linf_kernel(
    decision_ptr,
    x_ptr,
    grad_ptr,
    x0_ptr,
    x_prev_ptr,
    x_best_ptr,
    grad_best_ptr,
    step_size_ptr,
    eps: tl.float64,
    eps_ptr,
    lo: tl.float64,
    lo_ptr,
    hi: tl.float64,
    hi_ptr,
    momentum: tl.float64,
    rest: tl.float64,
    input_ptr,
    mean: tl.float64,
    mean_ptr,
    std: tl.float64,
    std_ptr,
    size,
    chunks,
    x_stride: tl.int64,
    grad_stride: tl.int64,
    x0_stride: tl.int64,
    x_prev_stride: tl.int64,
    x_best_stride: tl.int64,
    grad_best_stride: tl.int64,
    lo_stride: tl.int64,
    hi_stride: tl.int64,
    input_stride: tl.int64,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    at = (program - sample * chunks) * BLOCK + tl.arange(0, BLOCK)
    decision = tl.load(decision_ptr + sample)
    size = multiple(_extent(size, (decision & _SKIP) == 0), ALIGNED)
    mask = at < size
    first = (decision & _FIRST) != 0
    x_ptr = elements(x_ptr + sample * x_stride, at, ALIGNED)
    x_prev_ptr = elements(x_prev_ptr + sample * x_prev_stride, at, ALIGNED)
    x_best_ptr = elements(x_best_ptr + sample * x_best_stride, at, ALIGNED)
    grad_best_ptr = elements(grad_best_ptr + sample * grad_best_stride, at, ALIGNED)
    kept_x = _origin(x_ptr, x_best_ptr, at, size, decision)
    fed: tl.constexpr = input_ptr is not None
    grad_ptr += sample * grad_stride
    kept_grad = _ascent(grad_ptr, grad_best_ptr, std, std_ptr, at, size, decision, fed, ALIGNED, T)
    last = widened(tl.load(x_prev_ptr, mask, other=0.0), T)
    x = widened(kept_x, T)
    grad = finite_or_zero(widened(kept_grad, T))
    x0 = widened(tl.load(elements(x0_ptr + sample * x0_stride, at, ALIGNED), mask, other=0.0), T)
    improved = at < _extent(size, (decision & _IMPROVED) != 0)
    tl.store(x_best_ptr, kept_x, improved)
    tl.store(grad_best_ptr, kept_grad, improved)
    tl.store(x_prev_ptr, kept_x, mask)
    step = finite_or_zero(tl.load(step_size_ptr + sample))
    radius = ball_radius(eps, eps_ptr, sample, T)
    box = (lo, lo_ptr, sample * lo_stride, hi, hi_ptr, sample * hi_stride)
    z = x + tl.where(grad > 0, step, tl.where(grad < 0, -step, 0.0))
    z = in_box(x0 + clamp(z - x0, -radius, radius), *box, at, mask, ALIGNED, T)
    v = _heavy_ball(x, z, last, tl.full((), momentum, T), tl.full((), rest, T))
    v = in_box(x0 + clamp(v - x0, -radius, radius), *box, at, mask, ALIGNED, T)
    out = tl.where(first, z, v)
    tl.store(x_ptr, narrowed(out, x0, x_ptr.dtype.element_ty), mask)
    if input_ptr is not None:
        feed(input_ptr + sample * input_stride, out, mean, mean_ptr, std, std_ptr, at, mask, ALIGNED, T)


@kernel
def _start_kernel(
    decision_ptr,
    z_ptr,
    ascent_ptr,
    centre_ptr,
    x_ptr,
    grad_ptr,
    x0_ptr,
    x_best_ptr,
    grad_best_ptr,
    std: tl.float64,
    std_ptr,
    size,
    chunks,
    x_stride: tl.int64,
    grad_stride: tl.int64,
    x0_stride: tl.int64,
    x_best_stride: tl.int64,
    grad_best_stride: tl.int64,
    FED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best so far; z, ascent <- where the step starts and the gradient there; centre <- x0, unless it is None."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    at = (program - sample * chunks) * BLOCK + tl.arange(0, BLOCK)
    decision = tl.load(decision_ptr + sample)
    whole = size
    size = _extent(size, (decision & _SKIP) == 0)
    mask = at < size
    x_best_ptr += sample * x_best_stride + at
    grad_best_ptr += sample * grad_best_stride + at
    x = _origin(x_ptr + sample * x_stride + at, x_best_ptr, at, size, decision)
    grad_ptr += sample * grad_stride
    grad = _ascent(grad_ptr, grad_best_ptr, std, std_ptr, at, size, decision, FED, False, T)
    improved = at < _extent(size, (decision & _IMPROVED) != 0)
    tl.store(x_best_ptr, x, improved)
    tl.store(grad_best_ptr, grad, improved)
    tl.store(z_ptr + sample * whole + at, widened(x, T), mask)
    tl.store(ascent_ptr + sample * whole + at, widened(grad, T), mask)
    if centre_ptr is not None:
        x0 = tl.load(x0_ptr + sample * x0_stride + at, mask, other=0.0)
        tl.store(centre_ptr + sample * whole + at, widened(x0, T), mask)


@kernel
def _momentum_kernel(
    decision_ptr,
    z_ptr,
    x_ptr,
    x_prev_ptr,
    x_best_ptr,
    momentum: tl.float64,
    rest: tl.float64,
    size,
    chunks,
    x_stride: tl.int64,
    x_prev_stride: tl.int64,
    x_best_stride: tl.int64,
    heavy,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Z <- the point after the momentum, but for a first step; x_prev <- where the step started."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    at = (program - sample * chunks) * BLOCK + tl.arange(0, BLOCK)
    decision = tl.load(decision_ptr + sample)
    whole = size
    size = _extent(size, (decision & _SKIP) == 0)
    mask = at < size
    x_prev_ptr += sample * x_prev_stride + at
    kept = _origin(x_ptr + sample * x_stride + at, x_best_ptr + sample * x_best_stride + at, at, size, decision)
    if heavy:
        x = widened(kept, T)
        z = tl.load(z_ptr + sample * whole + at, mask, other=0.0)
        last = widened(tl.load(x_prev_ptr, mask, other=0.0), T)
        v = _heavy_ball(x, z, last, tl.full((), momentum, T), tl.full((), rest, T))
        tl.store(z_ptr + sample * whole + at, v, at < _extent(size, (decision & _FIRST) == 0))
    tl.store(x_prev_ptr, kept, mask)


@kernel
def _finish_kernel(
    decision_ptr,
    z_ptr,
    x_ptr,
    x0_ptr,
    input_ptr,
    mean: tl.float64,
    mean_ptr,
    std: tl.float64,
    std_ptr,
    size,
    chunks,
    x_stride: tl.int64,
    x0_stride: tl.int64,
    input_stride: tl.int64,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """X <- z."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    at = (program - sample * chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < _extent(size, (tl.load(decision_ptr + sample) & _SKIP) == 0)
    z = tl.load(z_ptr + sample * size + at, mask, other=0.0)
    x0 = widened(tl.load(x0_ptr + sample * x0_stride + at, mask, other=0.0), T)
    tl.store(x_ptr + sample * x_stride + at, narrowed(z, x0, x_ptr.dtype.element_ty), mask)
    if given(input_ptr):
        feed(input_ptr + sample * input_stride, z, mean, mean_ptr, std, std_ptr, at, mask, False, T)


def apgd_step_(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    loss: Tensor,  # [B]
    x0: Tensor,  # [B, ...]
    x_prev: Tensor,  # [B, ...]
    x_best: Tensor,  # [B, ...]
    grad_best: Tensor,  # [B, ...]
    best_loss: Tensor,  # [B]
    past_loss: Tensor,  # [B, 2]
    step_size: Tensor,  # [B]
    counters: Tensor,  # [B, 6] int32
    schedule: Tensor,  # [steps] int32
    eps: float,
    eps_tensor: Tensor | None,  # [B]
    norm: str,
    lo: float,
    lo_tensor: Tensor | None,  # [1 or B, ...]
    hi: float,
    hi_tensor: Tensor | None,  # [1 or B, ...]
    momentum: float,
    rho: float,
    active: Tensor | None,  # [B] bool
    model_input: Tensor | None = None,  # [B, ...]
    mean: float = 0.0,
    mean_tensor: Tensor | None = None,  # [1, ...]
    std: float = 1.0,
    std_tensor: Tensor | None = None,  # [1, ...]
) -> None:
    if x.numel() == 0:
        return
    batch, size = x.shape[0], math.prod(x.shape[1:])
    dtype = arithmetic(x)
    block = 1024
    chunks = triton.cdiv(size, block)
    grid = (batch * chunks,)
    decision = torch.empty(batch, dtype=torch.int32, device=x.device)
    radii = or_nothing(x, eps, eps_tensor)
    bounds = or_nothing(x, lo, lo_tensor, hi, hi_tensor)
    limits = (bound_stride(lo_tensor), bound_stride(hi_tensor))
    fed = read_by_model(x, (model_input, mean, mean_tensor, std, std_tensor))
    elementwise = {"T": dtype, "BLOCK": block, "enable_fp_fusion": False}
    with on_device(x):
        _decide_kernel[(batch,)](
            decision, loss, x, x0, x_best, best_loss, past_loss, step_size, counters, schedule, *radii, rho,
            mask_of(active, x), len(schedule), size, x.stride(0), x0.stride(0), x_best.stride(0), norm == "l1",
            **elementwise,
        )  # fmt: skip
        if norm == "linf":
            moved = (x, grad, x0, x_prev, x_best, grad_best)
            strides = (*(t.stride(0) for t in moved), *limits, input_stride(model_input))
            tensors = (*moved, lo_tensor, hi_tensor, model_input, mean_tensor, std_tensor)
            _linf_kernel[grid](
                decision, *moved, step_size, *radii, *bounds, momentum, 1 - momentum, *fed, size, chunks, *strides,
                ALIGNED=vectors((size, *strides), *tensors), **elementwise,
            )  # fmt: skip
            return
        # The ball kernel sees the arithmetic's dtype alone: one kernel for all storage.
        z = torch.empty(batch, size, dtype=compute_dtype(x.dtype), device=x.device)
        ascent = torch.empty_like(z)
        centre = None if x.dtype == z.dtype else torch.empty_like(z)
        _start_kernel[grid](
            decision, z, ascent, centre, x, grad, x0, x_best, grad_best, *fed[-2:], size, chunks, x.stride(0),
            grad.stride(0), x0.stride(0), x_best.stride(0), grad_best.stride(0), FED=model_input is not None,
            **elementwise,
        )  # fmt: skip
        on = (decision < _SKIP.value).view(torch.uint8)
        ball = x0 if centre is None else centre
        strides = (size, size, ball.stride(0), *limits, 0)
        values = (0.0, step_size, *radii, *bounds, on, *NO_INPUT)
        launch_ball(z, ascent, ball, values, 0, counters[:, _KEPT.value], size, strides, norm == "l2", dtype)
        _momentum_kernel[grid](
            decision, z, x, x_prev, x_best, momentum, 1 - momentum, size, chunks, x.stride(0), x_prev.stride(0),
            x_best.stride(0), norm == "l2", **elementwise,
        )  # fmt: skip
        if norm == "l2":
            again = (decision & (_SKIP.value | _FIRST.value) == 0).view(torch.uint8)
            projection = (*or_nothing(x, 0.0, None), *radii, *bounds, again, *NO_INPUT)
            launch_ball(z, None, ball, projection, 0, None, size, (size, 0, *strides[2:]), True, dtype)
        _finish_kernel[grid](
            decision, z, x, x0, nothing(x.dtype, x.device) if model_input is None else model_input,
            *or_nothing(x, mean, mean_tensor, std, std_tensor), size, chunks, x.stride(0), x0.stride(0),
            input_stride(model_input), **elementwise,
        )  # fmt: skip
