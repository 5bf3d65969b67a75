"""What the Triton kernels do to one element or read for one sample, and what their launches share."""

# mypy: allow-untyped-defs, allow-incomplete-defs
import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def number(scalar, pointer, sample, T: tl.constexpr):
    """The sample's number in the arithmetic's dtype."""
    if pointer is None:
        return tl.full((), scalar, T)
    else:
        return tl.load(pointer + sample)


@triton.jit
def bound(scalar, pointer, base, at, mask, T: tl.constexpr):
    """The bounds of the elements ``at``: one number, or one each."""
    if pointer is None:
        return tl.full((), scalar, T)
    else:
        return tl.load(pointer + base + at, mask, other=0.0)


@triton.jit
def finite_or_zero(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def ball_radius(scalar, pointer, sample, T: tl.constexpr):
    """The sample's eps; 0 where it is negative or not a number."""
    eps = number(scalar, pointer, sample, T)
    return tl.where(eps > 0, eps, 0.0)


@triton.jit
def clamp(value, lo, hi):
    return tl.minimum(tl.maximum(value, lo), hi)


@triton.jit
def widened(value, T: tl.constexpr):
    """From storage to the arithmetic's dtype ``T``, exactly."""
    if value.dtype == tl.bfloat16:
        # By its bits, because the interpreter's conversions of bfloat16 truncate and get subnormal numbers wrong.
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(T, bitcast=True)
    else:
        return value.to(T)


@triton.jit
def narrowed(value, centre, S: tl.constexpr):
    """To storage dtype ``S``; 16-bit storage rounds towards ``centre``, so that rounding never leaves the ball."""
    if S == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        cut = bits & -65536  # rounded towards zero
        outwards = (cut != bits) & ((value >= centre) != (bits >= 0))
        return (tl.where(outwards, cut + 65536, cut) >> 16).to(tl.int16).to(S, bitcast=True)
    elif S == tl.float16:
        out = value.to(S)
        back = out.to(tl.float32)
        over = tl.where(value >= centre, back > value, back < value)
        bits = out.to(tl.int16, bitcast=True)
        inwards = tl.where(tl.abs(back) > tl.abs(value), bits - 1, bits + 1).to(tl.int16)
        return tl.where(over, inwards, bits).to(S, bitcast=True)
    else:
        return value


@triton.jit
def _over(value, std, std_ptr, at, mask, T: tl.constexpr):
    """``value`` over the standard deviation, rounded once."""
    if std_ptr is None:
        spread = tl.full(value.shape, std, T)
    else:
        spread = tl.load(std_ptr + at, mask, other=1.0)
    return tl.div_rn(value, spread)


@triton.jit
def gradient(grad_ptr, std, std_ptr, at, mask, FED: tl.constexpr, T: tl.constexpr):
    """The gradient with respect to x; ``FED``: at ``grad_ptr`` lies that of what the model reads."""
    grad = widened(tl.load(grad_ptr + at, mask, other=0.0), T)
    if FED:
        grad = _over(grad, std, std_ptr, at, mask, T)
    return grad


@triton.jit
def feed(input_ptr, x, mean, mean_ptr, std, std_ptr, at, mask, T: tl.constexpr):
    """Write (x - mean) / std of the elements ``at``, rounded to nearest."""
    value = _over(x - bound(mean, mean_ptr, 0, at, mask, T), std, std_ptr, at, mask, T)
    S: tl.constexpr = input_ptr.dtype.element_ty
    if S == tl.bfloat16:
        # By its bits, as in `widened`.
        bits = value.to(tl.int32, bitcast=True)
        cut = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, cut, 0x7FC0).to(tl.int16).to(S, bitcast=True)
    tl.store(input_ptr + at, value.to(S), mask)


def arithmetic(x: Tensor) -> tl.dtype:
    """In what dtype arithmetic on x's storage is done."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device current: that is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


#: An operator's last five arguments where the model reads x itself.
NO_INPUT = (None, 0.0, None, 1.0, None)


def input_stride(model_input: Tensor | None) -> int:
    """Elements from one sample of what the model reads to the next one."""
    return 0 if model_input is None else model_input.stride(0)


def bound_stride(limit: Tensor | None) -> int:
    """Elements from one sample's bounds to the next one's."""
    return 0 if limit is None or limit.shape[0] == 1 else limit.stride(0)
