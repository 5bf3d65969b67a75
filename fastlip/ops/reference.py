"""The operators in plain PyTorch, which define each op and are what every kernel is tested against.

Linf is computed in the kernels' own precision and order, because backends must agree on it bit for bit. L2 and L1 are
computed in float64 and solved by bisection, a method that no kernel uses.
"""

import math

import torch
from torch import Tensor

from fastlip.ops._reference_judge import judge
from fastlip.ops._reference_operators import (
    direct_conv_,
    indirect_convs_,
    interleaved_layers_,
    krylov_bound,
    norm_along,
    operator_step_,
    pack_weights_,
    scaled_weight_grad,
    top_eigenpairs,
    winograd_conv_,
)
from fastlip.ops._schemas import Ball, Normalised, Saved, StepSize, takes_fields

__all__ = [
    "apgd_step_",
    "compute_dtype",
    "direct_conv_",
    "indirect_convs_",
    "interleaved_layers_",
    "judge",
    "kept_elements",
    "krylov_bound",
    "norm_along",
    "operator_step_",
    "pack_weights_",
    "pgd_step_",
    "philox",
    "project_",
    "random_start",
    "scaled_weight_grad",
    "top_eigenpairs",
    "winograd_conv_",
]

#: Halvings of the bracket, after which float64 cannot resolve it any further.
_BISECTIONS = 70


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which arithmetic on ``dtype`` storage is done: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(value: float, tensor: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-sample value as [B, 1, ...]; entries that are negative or not a number count as 0."""
    if tensor is None:
        # Rounded to the kernels' precision first: float64 arithmetic must see the same number.
        return torch.full((), value, dtype=compute_dtype(x.dtype), device=x.device).to(dtype)
    tensor = torch.where(tensor > 0, tensor, torch.zeros_like(tensor))
    return _keepdim(tensor.to(dtype), x)


def _steps(value: float, tensor: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-sample step size as [B, 1, ...]: any sign; entries that are not finite count as 0."""
    if tensor is None:
        return _rows(value, None, x, dtype)
    tensor = torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))
    return _keepdim(tensor.to(dtype), x)


def _bound(value: float, tensor: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    return _rows(value, None, x, dtype) if tensor is None else tensor.to(dtype)


def _box(ball: Ball, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _bound(ball.lo, ball.lo_tensor, x, dtype), _bound(ball.hi, ball.hi_tensor, x, dtype)


def _store(x: Tensor, value: Tensor, x0: Tensor) -> Tensor:
    """Round ``value`` to x's dtype; 16-bit storage rounds towards x0, so that rounding never leaves the ball."""
    out = value.to(x.dtype)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return out
    wide, centre = value.float(), x0.float()
    over = torch.where(wide >= centre, out.float() > wide, out.float() < wide)
    # One unit in the last place towards zero where the overshoot is away from zero, else away from it.
    shrink = (out.float().abs() > wide.abs()) & ~wide.isnan()
    bits = out.view(torch.int16)
    return torch.where(over, torch.where(shrink, bits - 1, bits + 1), bits).view(x.dtype)


def _finite_or_zero(grad: Tensor) -> Tensor:
    return torch.where(grad.isfinite(), grad, torch.zeros_like(grad))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def _keepdim(per_sample: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, ...] of x's rank."""
    return per_sample.reshape(-1, *([1] * (x.dim() - 1)))


def _sum(x: Tensor) -> Tensor:
    return _keepdim(_flat(x).sum(1), x)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, whose squares need not be in float64's range."""
    peak = _keepdim(_flat(x.abs()).amax(1), x)
    return peak * _sum((x / torch.where(peak > 0, peak, 1)).square()).sqrt()


def _project_l2(d: Tensor, lower: Tensor, upper: Tensor, eps: Tensor) -> Tensor:
    """clip(s d, lower, upper) with the largest s in (0, 1] that keeps the norm within eps.

    The search is for t = s max |d| / eps in units of eps: s itself may be out of float64's range.
    """
    whole = torch.minimum(torch.maximum(d, lower), upper)
    inside = _length(whole) <= eps
    peak = _keepdim(_flat(d.abs()).amax(1), d)
    shape, unit = d / torch.where(peak > 0, peak, 1), torch.where(inside | (eps == 0), 1, eps)
    low_cap, high_cap = lower / unit, upper / unit

    def clipped(t: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(t * shape, low_cap), high_cap)

    # Clipping only shortens, so that 1 / |shape| fits; halving the exponent finds scales of any magnitude.
    length = _length(shape)
    low = 1 / torch.where(length > 0, length, 1)
    high = torch.maximum((peak / unit).clamp_max(1e300), low)
    for _ in range(_BISECTIONS):
        t = low.sqrt() * high.sqrt()
        fits = _length(clipped(t)) <= 1
        low, high = torch.where(fits, t, low), torch.where(fits, high, t)
    return torch.where(inside, whole, torch.where(eps > 0, clipped(low) * eps, 0))


def _project_l1(d: Tensor, lower: Tensor, upper: Tensor, eps: Tensor) -> Tensor:
    """sign(d) min(max(|d| - lam, 0), b) with the smallest lam >= 0 that keeps the L1 norm within eps."""
    size, cap = d.abs(), torch.where(d > 0, upper, -lower)

    def shrunk(lam: Tensor) -> Tensor:
        return torch.minimum((size - lam).clamp_min(0), cap)

    high = _keepdim(_flat(size).amax(1), d)
    low = torch.zeros_like(high)
    inside = _sum(shrunk(low)) <= eps
    for _ in range(_BISECTIONS):
        lam = (low + high) / 2
        fits = _sum(shrunk(lam)) <= eps
        low, high = torch.where(fits, low, lam), torch.where(fits, lam, high)
    return d.sign() * torch.where(inside, shrunk(torch.zeros_like(low)), shrunk(high))


def _projected(v: Tensor, x0: Tensor, eps: Tensor, norm: str, lo: Tensor, hi: Tensor) -> Tensor:
    """Euclidean projection of v onto ball and box. Where x0 lies outside the box, the box wins."""
    d = v - x0
    if norm == "linf":
        return torch.minimum(torch.maximum(x0 + torch.minimum(torch.maximum(d, -eps), eps), lo), hi)
    lower, upper = (lo - x0).clamp_max(0), (hi - x0).clamp_min(0)
    project = _project_l2 if norm == "l2" else _project_l1
    return torch.minimum(torch.maximum(x0 + project(d, lower, upper, eps), lo), hi)


def _direction(grad: Tensor, norm: str, sparsity: float) -> Tensor:
    """Steepest ascent direction of unit norm; zero where the gradient is zero."""
    if norm == "linf":
        return grad.sign()
    size = grad.abs()
    peak = _keepdim(_flat(size).amax(1), grad)
    if norm == "l2":
        scaled = grad / torch.where(peak > 0, peak, 1)  # the square of a tiny or huge element leaves the range
        length = _sum(scaled.square()).sqrt()
        return scaled / torch.where(length > 0, length, 1)
    kept = kept_elements(grad[0].numel(), sparsity)
    threshold = _keepdim(_flat(size).topk(kept, dim=1).values[:, -1], grad)
    keep = (size >= threshold) & (size > 0)
    return grad.sign() * keep / _sum(keep.to(grad.dtype)).clamp_min(1)


def kept_elements(size: int, sparsity: float) -> int:
    """How many of ``size`` elements the L1 step moves (ties apart): those above the ``sparsity`` quantile."""
    return min(size, max(1, size - math.floor(sparsity * size)))


def _ascent(grad: Tensor, read: Normalised) -> Tensor:
    """Gradient with respect to x: that of the model's input (x - mean) / std by the chain rule."""
    return grad if read.model_input is None else grad.float() / _bound(read.std, read.std_tensor, grad, torch.float32)


def _write(read: Normalised, x: Tensor, active: Tensor | None) -> None:
    """Write what the model reads of x."""
    if read.model_input is None:
        return
    centred = x - _bound(read.mean, read.mean_tensor, x, torch.float32)
    value = (centred / _bound(read.std, read.std_tensor, x, torch.float32)).to(read.model_input.dtype)
    read.model_input.copy_(value if active is None else torch.where(_keepdim(active, x), value, read.model_input))


def _save(saved: Saved, x: Tensor, grad: Tensor, active: Tensor | None) -> None:
    """Save x, before it moves, where it is better than the best so far; and say where gradients are not finite."""
    if saved.best is not None and saved.better is not None:
        better = saved.better if active is None else saved.better & active
        saved.best.copy_(torch.where(_keepdim(better, x), x, saved.best))
    if saved.not_finite is not None:
        lost = ~_flat(grad.isfinite()).all(1)
        saved.not_finite.logical_or_(lost if active is None else lost & active)


def _update(x: Tensor, value: Tensor, x0: Tensor, active: Tensor | None) -> None:
    value = _store(x, value, x0)
    if active is not None:
        value = torch.where(_keepdim(active, x), value, x)
    x.copy_(value)


@takes_fields
def pgd_step_(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    step: StepSize,
    ball: Ball,
    sparsity: float,
    active: Tensor | None,  # [B] bool
    read: Normalised,
    saved: Saved,
) -> None:
    if x.numel() == 0:
        return
    _save(saved, x, grad, active)
    norm = ball.norm
    dtype = compute_dtype(x.dtype) if norm == "linf" else torch.float64
    length = _steps(step.step_size, step.step_size_tensor, x, dtype)
    centre = x0.to(dtype)
    if norm != "linf":  # whose signs no standard deviation changes
        grad = _ascent(grad, read)
    ascent = _finite_or_zero(grad.to(dtype))
    moved = x.to(dtype) + length * _direction(ascent, norm, sparsity)
    radius = _rows(ball.eps, ball.eps_tensor, x, dtype)
    low, high = _box(ball, x, dtype)
    _update(x, _projected(moved, centre, radius, norm, low, high), x0, active)
    _write(read, x, active)


@takes_fields
def project_(
    x: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    ball: Ball,
    active: Tensor | None,  # [B] bool
) -> None:
    if x.numel() == 0:
        return
    norm = ball.norm
    dtype = compute_dtype(x.dtype) if norm == "linf" else torch.float64
    radius = _rows(ball.eps, ball.eps_tensor, x, dtype)
    low, high = _box(ball, x, dtype)
    _update(x, _projected(x.to(dtype), x0.to(dtype), radius, norm, low, high), x0, active)


#: What each column of APGD's counters holds.
ITERATION, INCREASES, REDUCED, KEPT, SUPPORT, ARRIVED = range(6)
#: Sparse APGD (Croce and Hein 2021): the support shrinks by this share before a restart, and is divided by this for
#: the next step's; step sizes fall by the same factor to no less than this share of eps.
_L1_SHRUNK, _L1_FACTOR, _L1_LEAST = 0.95, 1.5, 10.0


@takes_fields
def apgd_step_(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    loss: Tensor,  # [B]
    x0: Tensor,  # [B, ...]
    x_prev: Tensor,  # [B, ...]
    x_best: Tensor,  # [B, ...]
    grad_best: Tensor,  # [B, ...]
    best_loss: Tensor,  # [B]
    past_loss: Tensor,  # [B, 2]: of the last iterate; the best at the last checkpoint
    step_size: Tensor,  # [B]
    counters: Tensor,  # [B, 6] int32
    schedule: Tensor,  # [steps] int32
    ball: Ball,
    momentum: float,
    rho: float,
    active: Tensor | None,  # [B] bool
    read: Normalised,
    saved: Saved,
) -> None:
    if x.numel() == 0:
        return
    _save(saved, x, grad, active)
    norm = ball.norm
    on = torch.ones_like(loss, dtype=torch.bool) if active is None else active
    arithmetic = compute_dtype(x.dtype)
    dtype = arithmetic if norm == "linf" else torch.float64
    size = x[0].numel()
    grad = _ascent(grad, read)

    def choose(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(_keepdim(where, x), a, b)

    loss = torch.where(loss.isnan(), -math.inf, loss)
    iteration = counters[:, ITERATION].long()
    first = iteration == 0
    improved = first | (loss > best_loss)
    best = torch.where(improved, loss, best_loss)
    x_top, grad_top = choose(improved, x, x_best), choose(improved, grad, grad_best)
    increases = counters[:, INCREASES] + (~first & (loss > past_loss[:, 0])).int()
    at_check = torch.where(first, best, past_loss[:, 1])

    window = torch.zeros_like(iteration)
    if len(schedule):
        window = torch.where(iteration < len(schedule), schedule[iteration.clamp_max(len(schedule) - 1)].long(), 0)
    check = ~first & (window > 0)
    steps, kept, support = step_size, counters[:, KEPT], counters[:, SUPPORT]
    if norm == "l1":
        found = _flat(x_top != x0).sum(1).int()
        restart = check & (found.double() < _L1_SHRUNK * support.double())
        radius = _rows(ball.eps, ball.eps_tensor, x, arithmetic).reshape(-1).expand_as(steps)
        shorter = torch.maximum(steps / _L1_FACTOR, radius / _L1_LEAST)
        steps = torch.where(check, torch.where(restart, radius, shorter), steps)
        support = torch.where(check, found, support)
        kept = torch.where(check, (2 * found + 2) // 3, kept)
    else:
        stuck = (counters[:, REDUCED] == 0) & (best == at_check)
        restart = check & ((increases.double() < rho * window.double()) | stuck)
        steps = torch.where(restart, steps / 2, steps)
    at_check = torch.where(check, best, at_check)
    increases = torch.where(check, 0, increases)
    reduced = torch.where(check, restart.int(), counters[:, REDUCED])

    here, ascent = choose(restart, x_top, x), choose(restart, grad_top, grad)
    centre, point = x0.to(dtype), here.to(dtype)
    radius = _rows(ball.eps, ball.eps_tensor, x, dtype)
    low, high = _box(ball, x, dtype)
    usable = torch.where(steps.isfinite(), steps, 0).to(dtype)
    if norm == "l1":
        moved = point + _keepdim(usable, x) * _sparse_direction(_finite_or_zero(ascent.to(dtype)), kept.clamp(1, size))
        out = _projected(moved, centre, radius, norm, low, high)
    else:
        moved = point + _keepdim(usable, x) * _direction(_finite_or_zero(ascent.to(dtype)), norm, 0.0)
        aim = _projected(moved, centre, radius, norm, low, high)
        last = x_prev.to(dtype)
        heavy = point + momentum * (aim - point) + (1 - momentum) * (point - last)
        out = choose(first, aim, _projected(heavy, centre, radius, norm, low, high))
    stored = _store(x, out, x0)

    for to, value in ((x_prev, here), (x_best, x_top), (grad_best, grad_top), (x, stored)):
        to.copy_(choose(on, value, to))
    past = torch.stack([torch.where(restart, best, loss), at_check], 1)
    count = torch.stack([(iteration + 1).int(), increases, reduced, kept, support, counters[:, ARRIVED]], 1)
    best_loss.copy_(torch.where(on, best, best_loss))
    step_size.copy_(torch.where(on, steps, step_size))
    past_loss.copy_(torch.where(on[:, None], past, past_loss))
    counters.copy_(torch.where(on[:, None], count.int(), counters))
    _write(read, x, active)


def _sparse_direction(grad: Tensor, kept: Tensor) -> Tensor:
    """Signs of the ``kept`` [B] largest magnitudes, ties included and zeros not, over their number."""
    size = grad.abs()
    ranked = _flat(size).sort(1, descending=True).values
    threshold = _keepdim(ranked.gather(1, kept.long()[:, None] - 1)[:, 0], grad)
    keep = (size >= threshold) & (size > 0)
    return grad.sign() * keep / _sum(keep.to(grad.dtype)).clamp_min(1)


_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in int64 arithmetic that cannot overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: Tensor, block: Tensor, tag: int, ids: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, as int64, for each counter (block, tag, id)."""
    block, ids = torch.broadcast_tensors(block, ids)
    c = [block & _MASK, torch.full_like(block, tag), ids & _MASK, (ids >> 32) & _MASK]
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c[2], _PHILOX_MULTIPLIERS[1])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK, (k1 + _PHILOX_WEYL[1]) & _MASK
    return c


#: Second counter word: the elements of a sample, and its one number for the radius (L2) or the slack (L1).
_ELEMENTS, _SAMPLE = 0, 1


def _integers(words: list[Tensor], wide: bool) -> Tensor:
    """Uniform integers of 24 bits (one word each) or 53 bits (two words each), [..., 4 or 2]."""
    if not wide:
        return torch.stack([w >> 8 for w in words], -1)
    pairs = [((words[i] >> 5) << 26) | (words[i + 1] >> 6) for i in (0, 2)]
    return torch.stack(pairs, -1)


@takes_fields
def random_start(
    x0: Tensor,  # [B, ...]
    ball: Ball,
    ids: Tensor,  # [B] int64
    key: Tensor,  # [1] int64
) -> Tensor:
    out = torch.empty_like(x0)
    if x0.numel() == 0:
        return out
    norm = ball.norm
    batch, size = x0.shape[0], x0[0].numel()
    wide = x0.dtype == torch.float64
    bits, lanes = (53, 2) if wide else (24, 4)
    dtype = compute_dtype(x0.dtype) if norm == "linf" else torch.float64
    radius = _rows(ball.eps, ball.eps_tensor, x0, dtype).nan_to_num(posinf=0.0)
    low, high = _box(ball, x0, dtype)

    blocks = torch.arange(-(-size // lanes), device=x0.device)
    words = philox(key, blocks[None, :], _ELEMENTS, ids[:, None])
    draws = _integers(words, wide)
    once = _integers(philox(key, torch.zeros_like(ids), _SAMPLE, ids), wide)[:, 0].to(dtype)
    once = (once + 0.5) * 2.0**-bits  # [B], in (0, 1)
    if norm == "linf":
        unit = (draws - 2 ** (bits - 1)).to(dtype) * 2.0 ** (1 - bits)
    elif norm == "l2":
        # Box-Muller on consecutive pairs: a Gaussian direction, then U^(1/n) for the radius.
        if wide:
            first, second = draws[..., 0:1], draws[..., 1:2]
        else:
            first, second = draws[..., 0::2], draws[..., 1::2]
        length = (-2 * ((first.to(dtype) + 0.5) * 2.0**-bits).log()).sqrt()
        angle = second.to(dtype) * (2.0**-bits * 2 * math.pi)
        unit = torch.stack([length * angle.cos(), length * angle.sin()], -1)
    else:
        signs = torch.stack([1 - 2 * (w & 1) for w in (words if not wide else words[1::2])], -1)
        unit = -((draws.to(dtype) + 0.5) * 2.0**-bits).log() * signs
    unit = unit.reshape(batch, -1)[:, :size]
    if norm == "l2":
        length = unit.square().sum(1).sqrt()
        unit = unit * (once ** (1 / size) / torch.where(length > 0, length, 1))[:, None]
    elif norm == "l1":
        unit = unit / (unit.abs().sum(1) - once.log())[:, None]
    centre = x0.to(dtype)
    moved = centre + radius * unit.reshape(x0.shape)
    return out.copy_(_store(x0, torch.minimum(torch.maximum(moved, low), high), x0))
