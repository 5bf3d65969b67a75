"""A step or a projection in "l2" and "l1": one program serves a sample.

It holds one of up to 4096 elements, and reads a larger one again in every pass.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlip.ops._triton.elements import (
    ball_radius,
    bound,
    feed,
    finite_or_zero,
    given,
    gradient,
    in_box,
    kernel,
    narrowed,
    nothing,
    number,
    save,
    takes_part,
    widened,
)

_MOST_SEARCH_STEPS = tl.constexpr(200)
_PATIENCE = tl.constexpr(12)  # Newton steps before every other one bisects
_LARGEST_L1 = tl.constexpr(1e300)  # of displacements in float64: as many as a sample may have, have a sum


@triton.jit
def _key(grad, S: tl.constexpr):
    """Magnitudes of finite numbers as integers in the same order, without the low bits that ``S`` cannot set."""
    size = tl.abs(grad)
    if S == tl.float64:
        return size.to(tl.int64, bitcast=True)
    elif S == tl.bfloat16:
        return size.to(tl.int32, bitcast=True) >> 16
    elif S == tl.float16:
        return size.to(tl.int32, bitcast=True) >> 13
    else:
        return size.to(tl.int32, bitcast=True)


@triton.jit
def _ascent(
    grad_ptr,
    ascent,
    std,
    std_ptr,
    at,
    mask,
    FED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    """The gradient with respect to x; 0 where it is not finite. ``ascent`` has a ``WHOLE`` sample's."""
    if WHOLE:
        return ascent
    else:
        return finite_or_zero(gradient(grad_ptr, std, std_ptr, at, mask, FED, False, T))


@triton.jit
def _l2_scale(
    grad_ptr,
    ascent,
    std,
    std_ptr,
    step,
    extent,
    span,
    FED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``peak`` and ``factor``: the gradient over its peak times ``factor`` is the move, of length ``step``.

    Squares of float32 are exact in float64's range; only float64 gradients are divided by their peak.
    """
    peak = tl.full((), 1.0, tl.float64)
    if T == tl.float64:
        most = tl.full((), 0.0, tl.float64)
        for start in range(0, span, BLOCK):
            at = start + tl.arange(0, BLOCK)
            grad = _ascent(grad_ptr, ascent, std, std_ptr, at, at < extent, FED, WHOLE, T)
            most = tl.maximum(most, tl.max(tl.abs(grad)))
        peak = tl.where(most > 0, most, 1.0)
    squares = tl.full((), 0.0, tl.float64)
    for start in range(0, span, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = _ascent(grad_ptr, ascent, std, std_ptr, at, at < extent, FED, WHOLE, T)
        scaled = _over_peak(grad, peak, T)
        squares += tl.sum(scaled * scaled)
    return peak, tl.where(squares > 0, step / tl.sqrt(tl.where(squares > 0, squares, 1.0)), 0.0)


@triton.jit
def _over_peak(grad, peak, T: tl.constexpr):
    if T == tl.float64:
        return grad / peak
    else:
        return grad.to(tl.float64)


@triton.jit
def _reaching(
    grad_ptr,
    ascent,
    std,
    std_ptr,
    key,
    extent,
    span,
    FED: tl.constexpr,
    WHOLE: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys reach each of ``key``, a triple in ascending order."""
    first = tl.full((), 0, tl.int32)
    second = tl.full((), 0, tl.int32)
    third = tl.full((), 0, tl.int32)
    for start in range(0, span, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keys = _key(_ascent(grad_ptr, ascent, std, std_ptr, at, at < extent, FED, WHOLE, T), S)
        first += tl.sum((keys >= key[0]).to(tl.int32))
        second += tl.sum((keys >= key[1]).to(tl.int32))
        third += tl.sum((keys >= key[2]).to(tl.int32))
    return first, second, third


@triton.jit
def _l1_threshold(
    grad_ptr,
    ascent,
    std,
    std_ptr,
    kept,
    extent,
    span,
    FED: tl.constexpr,
    WHOLE: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The key that the ``kept`` largest magnitudes reach, and how many do: ``kept`` and ties, but none that is zero."""
    peak = tl.full((), 0.0, T)
    for start in range(0, span, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = _ascent(grad_ptr, ascent, std, std_ptr, at, at < extent, FED, WHOLE, T)
        peak = tl.maximum(peak, tl.max(tl.abs(grad)))
    high = _key(peak, S) + 1  # reached by none
    low = tl.full((), 1, high.dtype)
    keys = (low, high, high)
    count, _, _ = _reaching(grad_ptr, ascent, std, std_ptr, keys, extent, span, FED, WHOLE, S, T, BLOCK)
    while (count > kept) & (high - low > 1):
        step = tl.maximum((high - low) // 4, 1)
        one = tl.minimum(low + step, high)
        two = tl.minimum(one + step, high)
        three = tl.minimum(two + step, high)
        keys = (one, two, three)
        first, second, third = _reaching(grad_ptr, ascent, std, std_ptr, keys, extent, span, FED, WHOLE, S, T, BLOCK)
        high = tl.where(first < kept, one, tl.where(second < kept, two, tl.where(third < kept, three, high)))
        low = tl.where(third >= kept, three, tl.where(second >= kept, two, tl.where(first >= kept, one, low)))
        count = tl.where(third >= kept, third, tl.where(second >= kept, second, tl.where(first >= kept, first, count)))
    return low, count


@triton.jit
def _values(
    x_ptr,
    grad_ptr,
    ascent,
    x0_ptr,
    lo,
    lo_ptr,
    hi,
    hi_ptr,
    std,
    std_ptr,
    at,
    mask,
    moves,
    move,
    FED: tl.constexpr,
    WHOLE: tl.constexpr,
    L2: tl.constexpr,
    T: tl.constexpr,
):
    """The moved v = x + move, x0, and the displacement's size, cap and sign, for the elements ``at``."""
    S: tl.constexpr = x_ptr.dtype.element_ty
    x0 = widened(tl.load(x0_ptr + at, mask, other=0.0), T)
    v = widened(tl.load(x_ptr + at, mask, other=0.0), T)
    if moves:
        grad = _ascent(grad_ptr, ascent, std, std_ptr, at, mask, FED, WHOLE, T)
        if L2:
            v = v + (_over_peak(grad, move[0], T) * move[1]).to(T)
        else:
            key = _key(grad, S)
            amount = move[1].to(T)
            v = v + tl.where((key >= move[0]) & (key > 0), tl.where(grad > 0, amount, -amount), 0.0)
    d = v - x0
    d = tl.where(d == d, d, 0.0)  # whatever the input, searches end and sums stay finite
    LARGEST: tl.constexpr = 3.4e38 if T == tl.float32 else 1.7e308 if L2 else _LARGEST_L1
    size = tl.minimum(tl.abs(d), LARGEST)
    if given(lo_ptr) | given(hi_ptr):
        low = bound(lo, lo_ptr, 0, at, mask, False, T)
        room = tl.where(d > 0, bound(hi, hi_ptr, 0, at, mask, False, T) - x0, x0 - low)
    else:
        room = tl.where(d > 0, tl.full((), hi, T) - x0, x0 - tl.full((), lo, T))
    cap = tl.maximum(room, 0.0)
    return v, x0, size, cap, tl.where(d < 0, -1.0, 1.0).to(T)


@triton.jit
def _unit_of(value):
    """The power of two at or below ``value`` >= 0, or the nearest to it that has an inverse."""
    power = ((value.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True)
    return tl.minimum(tl.maximum(power, 2.0**-1022), 2.0**1022)


@triton.jit
def _in_units(value, inverse, T: tl.constexpr):
    """In float64, times the inverse of a unit, which only float64 numbers need: squares of others stay in range."""
    if T == tl.float64:
        return value * inverse
    else:
        return value.to(tl.float64)


@triton.jit
def _shrunk(size, cap, head, tail, inverse, size_inverse, L2: tl.constexpr, T: tl.constexpr):
    """What the projection leaves of ``size``, given lambda = head + tail (l1); l2: in units, given s = head in them."""
    if L2:
        return tl.minimum(_in_units(size, size_inverse, T) * head, _in_units(cap, inverse, T))
    else:
        return tl.minimum(tl.maximum(size - head - tail, 0.0), cap)


@kernel
def _pgd_step_ball_kernel(
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
    best_ptr,
    better_ptr,
    not_finite_ptr,
    best_stride: tl.int64,
    kept,
    kept_ptr,
    kept_stride: tl.int64,
    extent,
    x_stride: tl.int64,
    grad_stride: tl.int64,
    x0_stride: tl.int64,
    lo_stride: tl.int64,
    hi_stride: tl.int64,
    input_stride: tl.int64,
    L2: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    S: tl.constexpr = x_ptr.dtype.element_ty
    FED: tl.constexpr = input_ptr is not None
    sample = tl.program_id(0).to(tl.int64)
    x_ptr += sample * x_stride
    x0_ptr += sample * x0_stride
    if given(lo_ptr):
        lo_ptr += sample * lo_stride
    if given(hi_ptr):
        hi_ptr += sample * hi_stride
    extent = tl.where(takes_part(active_ptr, sample), extent, 0)
    span = BLOCK if WHOLE else extent

    if given(kept_ptr):
        kept = tl.maximum(1, tl.minimum(extent, tl.load(kept_ptr + sample * kept_stride)))
    moves = given(grad_ptr)
    grad_ptr += sample * grad_stride
    if given(best_ptr) | given(not_finite_ptr):
        for start in range(0, span, BLOCK):
            at = start + tl.arange(0, BLOCK)
            save(
                best_ptr, better_ptr, not_finite_ptr, best_stride, sample, x_ptr, grad_ptr, at, at < extent, False, T
            )  # fmt: skip
    ascent = tl.full((), 0.0, T)
    if WHOLE:  # one block holds the sample: it is read once
        at = tl.arange(0, BLOCK)
        ascent = finite_or_zero(gradient(grad_ptr, std, std_ptr, at, (at < extent) & moves, FED, False, T))
    unit = tl.full((), 1.0 if L2 else 1, tl.float64 if L2 else tl.int64 if S == tl.float64 else tl.int32)
    amount = tl.full((), 0.0, tl.float64)
    if moves:
        step = finite_or_zero(number(step_size, step_size_ptr, sample, T)).to(tl.float64)
        if L2:
            unit, amount = _l2_scale(grad_ptr, ascent, std, std_ptr, step, extent, span, FED, WHOLE, T, BLOCK)
        else:
            unit, count = _l1_threshold(grad_ptr, ascent, std, std_ptr, kept, extent, span, FED, WHOLE, S, T, BLOCK)
            amount = step / tl.maximum(count, 1)
    move = (unit, amount)

    if WHOLE:
        at = tl.arange(0, BLOCK)
        mask = at < extent
        v, x0, size, cap, sign = _values(
            x_ptr, grad_ptr, ascent, x0_ptr, lo, lo_ptr, hi, hi_ptr, std, std_ptr, at, mask, moves, move, FED, WHOLE,
            L2, T,
        )  # fmt: skip

    radius = ball_radius(eps, eps_ptr, sample, T).to(tl.float64)
    # Of eps and what the box lets an element move, a unit near eps; of sizes, one near the largest beyond eps.
    unit_of_eps = tl.full((), 1.0, tl.float64)
    size_unit = tl.full((), 1.0, tl.float64)
    if L2 and T == tl.float64:
        peak = radius
        for start in range(0, span, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < extent
            if not WHOLE:
                _, _, size, cap, _ = _values(
                    x_ptr, grad_ptr, ascent, x0_ptr, lo, lo_ptr, hi, hi_ptr, std, std_ptr, at, mask, moves, move, FED,
                    WHOLE, L2, T,
                )  # fmt: skip
            peak = tl.maximum(peak, tl.max(tl.where(mask, size, 0.0)))
        unit_of_eps = _unit_of(radius)
        size_unit = _unit_of(peak)
    inverse = 1 / unit_of_eps
    size_inverse = 1 / size_unit

    # Sums of the box alone, of the displacement, and the number of elements that neither end of [0, cap] holds.
    within = tl.full((), 0.0, tl.float64)
    whole = tl.full((), 0.0, tl.float64)
    free = tl.full((), 0, tl.int32)
    for start in range(0, span, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < extent
        if not WHOLE:
            _, _, size, cap, _ = _values(
                x_ptr, grad_ptr, ascent, x0_ptr, lo, lo_ptr, hi, hi_ptr, std, std_ptr, at, mask, moves, move, FED,
                WHOLE, L2, T,
            )  # fmt: skip
        boxed = tl.where(mask, tl.minimum(size, cap), 0.0).to(tl.float64)
        all_of_it = tl.where(mask, size, 0.0).to(tl.float64)
        if L2:
            boxed = _in_units(boxed, inverse, T)
            all_of_it = _in_units(all_of_it, size_inverse, T)
            within += tl.sum(boxed * boxed)
            whole += tl.sum(all_of_it * all_of_it)
        else:
            within += tl.sum(boxed)
            whole += tl.sum(all_of_it)
            free += tl.sum(((all_of_it > 0) & (boxed < cap.to(tl.float64))).to(tl.int32))

    if L2:
        # s^2 <- (eps^2 - sum of cap^2 where capped) / (sum of size^2 elsewhere), until no further element is capped.
        target = (radius * inverse) * (radius * inverse)
        most = (size_unit * inverse) * (size_unit * inverse)  # s = 1
        inside = within <= target
        square = tl.where(inside, 0.0, target / tl.where(whole > 0, whole, 1.0))
        capped = tl.full((), -1, tl.int32)
        going = within > target
        while going:
            head = tl.sqrt(square)  # may be below float32's range
            room = target
            rest = tl.full((), 0.0, tl.float64)
            held = tl.full((), 0, tl.int32)
            for start in range(0, span, BLOCK):
                at = start + tl.arange(0, BLOCK)
                mask = at < extent
                if not WHOLE:
                    _, _, size, cap, _ = _values(
                        x_ptr, grad_ptr, ascent, x0_ptr, lo, lo_ptr, hi, hi_ptr, std, std_ptr, at, mask, moves, move,
                        FED, WHOLE, L2, T,
                    )  # fmt: skip
                own = _in_units(size, size_inverse, T)
                room_of_it = _in_units(cap, inverse, T)
                full = mask & (own * head >= room_of_it)
                room -= tl.sum(tl.where(full, room_of_it * room_of_it, 0.0))
                rest += tl.sum(tl.where(mask & (own * head < room_of_it), own * own, 0.0))
                held += tl.sum(full.to(tl.int32))
            following = room / tl.where(rest > 0, rest, 1.0)
            going = (held != capped) & (rest > 0) & (following > square) & (following <= most)
            square = tl.where(going, following, square)
            capped = held
        head = tl.sqrt(square)
        tail = tl.full((), 0.0, tl.float64)
    else:
        # Newton's method for sum of delta = eps inside a bracket, lambda carried in float64.
        TOLERANCE: tl.constexpr = 1e-13 if T == tl.float64 else 2e-7
        target = radius
        fits = within <= target
        inside = fits & ((target < _LARGEST_L1) | (target == float("inf")))  # else sizes may have been cut
        low = tl.full((), 0.0, tl.float64)
        high = whole
        total = within
        going = (within > target) & (target > 0)
        lam = tl.where(going | fits, low, high)
        steps = tl.full((), 0, tl.int32)
        while going:
            newton = lam + (total - target) / tl.maximum(free, 1)
            stuck = (free > 0) & (newton == lam)  # lambda is as fine as it gets: its neighbour, or done
            settled = stuck & (total < target)
            newton = tl.where(stuck, lam * (1 + 2.3e-16), newton)
            astray = (free == 0) | (newton <= low) | (newton >= high)
            slow = (steps >= _PATIENCE) & (steps % 2 == 1)
            following = tl.where(astray | slow, low + (high - low) / 2, newton)
            ended = (following <= low) | (following >= high) | (steps >= _MOST_SEARCH_STEPS)
            lam = tl.where(settled, lam, tl.where(ended, high, following))
            head = lam.to(T)
            tail = (lam - head).to(T)
            total = tl.full((), 0.0, tl.float64)
            free = tl.full((), 0, tl.int32)
            for start in range(0, span, BLOCK):
                at = start + tl.arange(0, BLOCK)
                mask = at < extent
                if not WHOLE:
                    _, _, size, cap, _ = _values(
                        x_ptr, grad_ptr, ascent, x0_ptr, lo, lo_ptr, hi, hi_ptr, std, std_ptr, at, mask, moves, move,
                        FED, WHOLE, L2, T,
                    )  # fmt: skip
                left = tl.where(mask, _shrunk(size, cap, head, tail, inverse, size_inverse, L2, T), 0.0)
                total += tl.sum(left.to(tl.float64))
                free += tl.sum(((left > 0) & (left < cap)).to(tl.int32))
            near = tl.abs(total - target) <= TOLERANCE * target
            low = tl.where(total > target, lam, low)
            high = tl.where(total > target, high, lam)
            going = (near | settled | ended) == 0
            steps += 1
        head = lam.to(T)
        tail = (lam - head).to(T)

    for start in range(0, span, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < extent
        if not WHOLE:
            v, x0, size, cap, sign = _values(
                x_ptr, grad_ptr, ascent, x0_ptr, lo, lo_ptr, hi, hi_ptr, std, std_ptr, at, mask, moves, move, FED,
                WHOLE, L2, T,
            )  # fmt: skip
        left = _shrunk(size, cap, head, tail, inverse, size_inverse, L2, T)
        if L2:
            left = (left * unit_of_eps).to(T)
        out = tl.where(inside, v, x0 + sign * left)
        out = in_box(out, lo, lo_ptr, 0, hi, hi_ptr, 0, at, mask, False, T)
        tl.store(x_ptr + at, narrowed(out, x0, S), mask)
        if FED:
            feed(input_ptr + sample * input_stride, out, mean, mean_ptr, std, std_ptr, at, mask, False, T)


def launch_ball(
    x: Tensor,
    grad: Tensor | None,
    x0: Tensor,
    values: tuple[float | Tensor | None, ...],
    kept: int,
    kept_tensor: Tensor | None,  # [B] int32, any stride
    size: int,
    strides: tuple[int, ...],
    l2: bool,
    dtype: tl.dtype,
) -> None:
    """One program a sample; ``values`` and ``strides`` in the kernel's order."""
    block = 1024 if size <= 1024 else 4096
    _pgd_step_ball_kernel[(x.shape[0],)](
        x,
        nothing(x.dtype, x.device) if grad is None else grad,
        x0,
        *values,
        kept,
        nothing(torch.int32, x.device) if kept_tensor is None else kept_tensor,
        0 if kept_tensor is None else kept_tensor.stride(0),
        size,
        *strides,
        L2=l2,
        T=dtype,
        WHOLE=size <= block,
        BLOCK=block,
        num_warps=8 if block > 1024 else 4,
        enable_fp_fusion=False,
    )
