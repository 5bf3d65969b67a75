"""pgd_step_ and project_ (a step without a gradient): "linf" is one pass over the batch; see ball.py for the others."""

# mypy: allow-untyped-defs, allow-incomplete-defs
import math

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
    in_box,
    input_stride,
    kernel,
    mask_of,
    multiple,
    narrowed,
    nothing,
    number,
    on_device,
    or_nothing,
    read_by_model,
    takes_part,
    vectors,
    widened,
)
from fastlip.ops.reference import kept_elements


@kernel
def _pgd_step_linf_kernel(
    x_ptr,
    grad_ptr,
    x0_ptr,
    step_size: tl.float64,
    step_size_ptr,
    eps: tl.float64,
    eps_ptr,
    lo: tl.float64,
    lo_ptr,
    hi: tl.float64,
    hi_ptr,
    active_ptr,
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
    size = multiple(tl.where(takes_part(active_ptr, sample), size, 0), ALIGNED)
    mask = at < size
    x_ptr = elements(x_ptr + sample * x_stride, at, ALIGNED)
    x0 = widened(tl.load(elements(x0_ptr + sample * x0_stride, at, ALIGNED), mask, other=0.0), T)
    v = widened(tl.load(x_ptr, mask, other=0.0), T)
    if given(grad_ptr):
        grad = tl.load(elements(grad_ptr + sample * grad_stride, at, ALIGNED), mask, other=0.0)
        grad = finite_or_zero(widened(grad, T))  # for its sign
        step = finite_or_zero(number(step_size, step_size_ptr, sample, T))
        v = v + tl.where(grad > 0, step, tl.where(grad < 0, -step, 0.0))
    radius = ball_radius(eps, eps_ptr, sample, T)
    v = x0 + clamp(v - x0, -radius, radius)
    v = in_box(v, lo, lo_ptr, sample * lo_stride, hi, hi_ptr, sample * hi_stride, at, mask, ALIGNED, T)
    tl.store(x_ptr, narrowed(v, x0, x_ptr.dtype.element_ty), mask)
    if input_ptr is not None:
        feed(input_ptr + sample * input_stride, v, mean, mean_ptr, std, std_ptr, at, mask, ALIGNED, T)


def _step(
    x: Tensor,
    grad: Tensor | None,
    x0: Tensor,
    step_size: float,
    step_size_tensor: Tensor | None,
    eps: float,
    eps_tensor: Tensor | None,
    norm: str,
    lo: float,
    lo_tensor: Tensor | None,
    hi: float,
    hi_tensor: Tensor | None,
    sparsity: float,
    active: Tensor | None,
    fed: tuple[Tensor | None, float, Tensor | None, float, Tensor | None],
) -> None:
    if x.numel() == 0:
        return
    batch, size = x.shape[0], math.prod(x.shape[1:])
    numbers = (step_size, step_size_tensor, eps, eps_tensor, lo, lo_tensor, hi, hi_tensor)
    values = (*or_nothing(x, *numbers), mask_of(active, x), *read_by_model(x, fed))
    strides: tuple[int, ...] = (
        x.stride(0),
        0 if grad is None else grad.stride(0),
        x0.stride(0),
        bound_stride(lo_tensor),
        bound_stride(hi_tensor),
        input_stride(fed[0]),
    )
    with on_device(x):
        if norm == "linf":
            packed = all(t is None or t.stride(0) == size for t in (x, grad, x0, fed[0]))
            if packed and not any(isinstance(value, Tensor) for value in (*numbers, active, *fed[1:])):
                batch, size = 1, batch * size  # one number each for all: the samples' borders do not matter
                strides = (0,) * len(strides)
            block = 1024
            chunks = triton.cdiv(size, block)
            _pgd_step_linf_kernel[(batch * chunks,)](
                x,
                nothing(x.dtype, x.device) if grad is None else grad,
                x0,
                *values,
                size,
                chunks,
                *strides,
                ALIGNED=vectors((size, *strides), x, grad, x0, lo_tensor, hi_tensor, fed[0], fed[2], fed[4]),
                T=arithmetic(x),
                BLOCK=block,
                enable_fp_fusion=False,
            )
            return
        launch_ball(
            x, grad, x0, values, kept_elements(size, sparsity), None, size, strides, norm == "l2", arithmetic(x)
        )


def pgd_step_(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    step_size: float,
    step_size_tensor: Tensor | None,  # [B]
    eps: float,
    eps_tensor: Tensor | None,  # [B]
    norm: str,
    lo: float,
    lo_tensor: Tensor | None,  # [1 or B, ...]
    hi: float,
    hi_tensor: Tensor | None,  # [1 or B, ...]
    sparsity: float,
    active: Tensor | None,  # [B] bool
    model_input: Tensor | None = None,  # [B, ...]
    mean: float = 0.0,
    mean_tensor: Tensor | None = None,  # [1, ...]
    std: float = 1.0,
    std_tensor: Tensor | None = None,  # [1, ...]
) -> None:
    fed = (model_input, mean, mean_tensor, std, std_tensor)
    _step(
        x,
        grad,
        x0,
        step_size,
        step_size_tensor,
        eps,
        eps_tensor,
        norm,
        lo,
        lo_tensor,
        hi,
        hi_tensor,
        sparsity,
        active,
        fed,
    )


def project_(
    x: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    eps: float,
    eps_tensor: Tensor | None,  # [B]
    norm: str,
    lo: float,
    lo_tensor: Tensor | None,  # [1 or B, ...]
    hi: float,
    hi_tensor: Tensor | None,  # [1 or B, ...]
    active: Tensor | None,  # [B] bool
) -> None:
    _step(x, None, x0, 0.0, None, eps, eps_tensor, norm, lo, lo_tensor, hi, hi_tensor, 0.0, active, NO_INPUT)
