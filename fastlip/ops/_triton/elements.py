"""What the Triton kernels do to one element or read for one sample, and what their launches share."""

# mypy: allow-untyped-defs, allow-incomplete-defs
import contextlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlip.ops.reference import compute_dtype

#: Elements that a vector access reads or writes at most: 16 bytes of a 16-bit dtype.
VECTOR = tl.constexpr(8)


def kernel(function: Callable[..., object]):
    """A kernel that Triton compiles once for its dtypes and constexprs.

    By itself it would compile again for every argument that is 1, that 16 divides or that stops being so: once an image
    size. What a kernel is to know of its sizes and addresses, its launch says in an argument of its own.
    """
    names = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=names)(function)


@triton.jit
def given(pointer):
    """Whether an argument that may be ``nothing`` is something."""
    return pointer.to(tl.int64) != 0


@triton.jit
def number(scalar, pointer, sample, T: tl.constexpr):
    """The sample's number in the arithmetic's dtype."""
    return tl.load(pointer + sample, given(pointer), other=tl.full((), scalar, T))


@triton.jit
def takes_part(pointer, sample):
    """Whether the sample takes part."""
    return tl.load(pointer + sample, given(pointer), other=1) != 0


@triton.jit
def multiple(value, ALIGNED: tl.constexpr):
    """``value``; where ``ALIGNED``, the compiler knows that ``VECTOR`` divides it."""
    if ALIGNED:
        return value // VECTOR * VECTOR
    else:
        return value


@triton.jit
def elements(pointer, at, ALIGNED: tl.constexpr):
    """Addresses of the elements ``at``; where ``ALIGNED``, the compiler knows that 16 divides ``pointer``."""
    address = pointer + at
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def bound(scalar, pointer, base, at, mask, ALIGNED: tl.constexpr, T: tl.constexpr):
    """The bounds of the elements ``at``: one number, or one each."""
    return tl.load(elements(pointer + base, at, ALIGNED), mask & given(pointer), other=tl.full((), scalar, T))


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
def in_box(value, lo, lo_ptr, lo_base, hi, hi_ptr, hi_base, at, mask, ALIGNED: tl.constexpr, T: tl.constexpr):
    """``value`` between its bounds; a branch, because numbers need fewer registers than tensors."""
    if given(lo_ptr) | given(hi_ptr):
        low = bound(lo, lo_ptr, lo_base, at, mask, ALIGNED, T)
        value = clamp(value, low, bound(hi, hi_ptr, hi_base, at, mask, ALIGNED, T))
    else:
        value = clamp(value, tl.full((), lo, T), tl.full((), hi, T))
    return value


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
def quotient(dividend, divisor, T: tl.constexpr):
    """Rounded once; in float32 ``/`` is approximate."""
    if T == tl.float64:
        return dividend / divisor
    else:
        return tl.div_rn(dividend, divisor)


@triton.jit
def _over(value, std, std_ptr, at, mask, ALIGNED: tl.constexpr, T: tl.constexpr):
    """``value`` over the standard deviation, rounded once."""
    one = tl.where(given(std_ptr), 1.0, tl.full((), std, T))
    spread = tl.load(elements(std_ptr, at, ALIGNED), mask & given(std_ptr), other=one)
    return quotient(value, spread, T)


@triton.jit
def gradient(grad_ptr, std, std_ptr, at, mask, FED: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr):
    """The gradient with respect to x; ``FED``: at ``grad_ptr`` lies that of what the model reads."""
    grad = widened(tl.load(elements(grad_ptr, at, ALIGNED), mask, other=0.0), T)
    if FED:
        grad = _over(grad, std, std_ptr, at, mask, ALIGNED, T)
    return grad


@triton.jit
def feed(input_ptr, x, mean, mean_ptr, std, std_ptr, at, mask, ALIGNED: tl.constexpr, T: tl.constexpr):
    """Write (x - mean) / std of the elements ``at``, rounded to nearest."""
    centred = x - bound(mean, mean_ptr, 0, at, mask, ALIGNED, T)
    value = _over(centred, std, std_ptr, at, mask, ALIGNED, T)
    S: tl.constexpr = input_ptr.dtype.element_ty
    if S == tl.bfloat16:
        # By its bits, as in `widened`.
        bits = value.to(tl.int32, bitcast=True)
        cut = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, cut, 0x7FC0).to(tl.int16).to(S, bitcast=True)
    tl.store(elements(input_ptr, at, ALIGNED), value.to(S), mask)


@triton.jit
def save(
    best_ptr, better_ptr, not_finite_ptr, best_stride, sample, x_ptr, grad_ptr, at, mask, ALIGNED: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Save the sample's elements ``at`` where they are better, and tell where its gradient's are not finite."""
    if given(best_ptr):
        better = tl.load(better_ptr + sample) != 0
        x = tl.load(elements(x_ptr, at, ALIGNED), mask & better, other=0.0)
        tl.store(elements(best_ptr + sample * best_stride, at, ALIGNED), x, mask & better)
    if given(not_finite_ptr):
        grad = widened(tl.load(elements(grad_ptr, at, ALIGNED), mask, other=0.0), T)
        lost = (tl.abs(grad) < float("inf")) == 0
        tl.store(not_finite_ptr + sample + tl.zeros_like(at), 1, mask & lost)  # all of them write the same


def arithmetic(x: Tensor) -> tl.dtype:
    """In what dtype arithmetic on x's storage is done."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device current: that is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@cache
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A null pointer of a type, in place of None, with which a kernel would be compiled once more."""
    return torch.empty(0, dtype=dtype, device=device)


def or_nothing(x: Tensor, *values: float | Tensor | None) -> tuple[float | Tensor, ...]:
    """``values`` with null pointers to the arithmetic's dtype for None."""
    dtype = compute_dtype(x.dtype)
    return tuple(nothing(dtype, x.device) if value is None else value for value in values)


def mask_of(active: Tensor | None, x: Tensor) -> Tensor:
    """The samples that take part, as kernels read them; a null pointer for all."""
    return nothing(torch.uint8, x.device) if active is None else active.view(torch.uint8)


def saved_by(
    x: Tensor, best: Tensor | None, better: Tensor | None, not_finite: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """An operator's last three arguments with null pointers for None, and the elements from one best to the next."""
    where = nothing(x.dtype, x.device) if best is None else best
    return where, mask_of(better, x), mask_of(not_finite, x), 0 if best is None else best.stride(0)


def read_by_model(x: Tensor, fed: tuple[Tensor | None, float, Tensor | None, float, Tensor | None]) -> tuple:
    """An operator's group of five arguments; kernels for what the model reads are not those for x alone."""
    return NO_INPUT if fed[0] is None else or_nothing(x, *fed)


def vectors(numbers: tuple[int, ...], *tensors: Tensor | None) -> bool:
    """Whether vectors cover all samples: ``VECTOR`` divides their size and strides, and tensors begin at 16 bytes.

    Not asked of float64: two elements are a vector, and a warp's single ones fill its lines of the cache as well.
    """
    there = [t for t in tensors if t is not None]
    return (
        there[0].dtype != torch.float64
        and not any(n % VECTOR.value for n in numbers)
        and not any(t.data_ptr() % 16 for t in there)
    )


#: An operator's group of five arguments where the model reads x itself.
NO_INPUT = (None, 0.0, None, 1.0, None)


def input_stride(model_input: Tensor | None) -> int:
    """Elements from one sample of what the model reads to the next one."""
    return 0 if model_input is None else model_input.stride(0)


def bound_stride(limit: Tensor | None) -> int:
    """Elements from one sample's bounds to the next one's."""
    return 0 if limit is None or limit.shape[0] == 1 else limit.stride(0)
