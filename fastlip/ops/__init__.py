"""Fused operators: each is one function with CPU, CUDA and Triton implementations behind it.

Semantics shared by all (checked on every backend against ``fastlip.ops.reference``):

- ``x``, ``grad``, ``x0`` are [B, ...], float32, float64, float16 or bfloat16. Arithmetic is float64 for float64 and
  float32 otherwise; 16-bit results are rounded towards ``x0``, so rounding never leaves the ball.
- ``eps`` and ``step_size`` are floats or [B] tensors. Tensors are not inspected (that would synchronise a GPU):
  entries of ``eps`` that are negative or NaN, and of ``step_size`` that are not finite, count as 0.
- ``bounds`` are floats or tensors that broadcast to ``x``; the result always lies within them. ``x0`` should; where
  it does not, the box wins.
- Samples with ``active`` False are left as they are.
- Gradient elements that are not finite count as 0. A sample whose ``x`` or ``x0`` holds a NaN is undefined; other
  samples are unaffected.
- Any memory layout is accepted. Where every sample is dense (contiguous or channels_last, any distance between
  samples) and ``x``, ``grad`` and ``x0`` agree on it nothing is copied; otherwise the operand that differs is.
- The operators are not differentiable: ``grad`` and ``x0`` are taken as constants, and an ``x`` that requires grad is
  an error where gradients are enabled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from fastlip.ops import _fakes  # noqa: F401  # registers them
from fastlip.ops._krylov import krylov_bound, top_eigenpairs
from fastlip.ops._operator_plan import ConvGeometry, OperatorPlan, operator_plan, pack_weight, packed_size
from fastlip.ops._operator_step import PRODUCTS, Products, operator_step_
from fastlip.ops._register import Backend, backends
from fastlip.ops.reference import compute_dtype

__all__ = [
    "PRODUCTS",
    "APGDState",
    "Backend",
    "ConvGeometry",
    "Norm",
    "OperatorPlan",
    "Products",
    "apgd_schedule",
    "apgd_state",
    "apgd_step_",
    "backends",
    "krylov_bound",
    "operator_plan",
    "operator_step_",
    "pack_weight",
    "packed_size",
    "pgd_step",
    "pgd_step_",
    "project",
    "project_",
    "random_start",
    "top_eigenpairs",
]

Norm = Literal["linf", "l2", "l1"]

_NORMS = ("linf", "l2", "l1")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ops = torch.ops.fastlip

PerSample = float | Tensor
Bounds = tuple[PerSample, PerSample]


def pgd_step_(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    *,
    step_size: PerSample,
    eps: PerSample,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    active: Tensor | None = None,  # [B] bool
) -> Tensor:
    """One projected gradient ascent step, in place: x <- P(x + step_size * direction(grad)); returns ``x``.

    The direction has unit norm: sign(grad) for "linf"; grad / ||grad||_2 for "l2"; for "l1" the signs of the
    elements whose magnitude reaches the ``sparsity`` quantile (ties kept, at least one element), divided by their
    number (Tramer and Boneh 2019, SLIDE; one-hot at ``sparsity=1``). A zero gradient moves nothing. P is the exact
    Euclidean projection onto the intersection of the eps ball around ``x0`` with the box ``bounds``, not an alternation
    of the two. "linf" is bit for bit the step of torchattacks' PGD (Madry et al. 2018) on finite gradients.

    Args:
        x: current iterate, [B, ...].
        grad: gradient of the loss to be increased, like ``x``.
        x0: centre of the ball, like ``x`` and in memory of its own; may be expanded along B.
        step_size: length of the step in the units of ``x``, float or [B]; negative descends.
        eps: radius of the ball in ``norm``, float or [B], >= 0; ``inf`` leaves only the box.
        norm: "linf", "l2" or "l1".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``x``.
        sparsity: share of elements in [0, 1] that an "l1" step leaves alone.
        active: [B] bool; False leaves a sample as it is.

    Raises:
        ValueError: a shape, norm, layout or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
        RuntimeError: ``x`` requires grad while gradients are enabled.
    """
    _check_inputs(x, grad=grad, x0=x0)
    step, steps = _per_sample(step_size, x, "step_size")
    if not math.isfinite(step):
        raise ValueError(f"step_size must be finite, got {step}")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    radius, radii = _radius(eps, x)
    target, grad, x0 = _in_one_layout(x, grad, x0)
    lo, los, hi, his = _limits(bounds, target)
    active = _mask(active, x)
    name = _norm(norm)
    _ops.pgd_step_(target, grad, x0, step, steps, radius, radii, name, lo, los, hi, his, sparsity, active)
    return x if target is x else x.copy_(target)


def project_(
    x: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    *,
    eps: PerSample,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    active: Tensor | None = None,  # [B] bool
) -> Tensor:
    """Euclidean projection of ``x`` onto the eps ball around ``x0`` and the box ``bounds``, in place; returns ``x``.

    Exact for the intersection in every norm: "l2" solves for the scale s in clip(s d, lo - x0, hi - x0), "l1" for the
    threshold of a box-constrained soft-thresholding (a continuous quadratic knapsack; Condat 2016), d = x - x0. Float
    results satisfy ||x - x0|| <= eps (1 + 1e-6) up to half a unit in the last place of each element.

    Args:
        x: points to project, [B, ...].
        x0: centre of the ball, like ``x`` and in memory of its own; may be expanded along B.
        eps: radius of the ball in ``norm``, float or [B], >= 0; ``inf`` leaves only the box.
        norm: "linf", "l2" or "l1".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``x``.
        active: [B] bool; False leaves a sample as it is.

    Raises:
        ValueError: a shape, norm, layout or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
        RuntimeError: ``x`` requires grad while gradients are enabled.
    """
    _check_inputs(x, x0=x0)
    radius, radii = _radius(eps, x)
    target, x0 = _in_one_layout(x, x0)
    lo, los, hi, his = _limits(bounds, target)
    _ops.project_(target, x0, radius, radii, _norm(norm), lo, los, hi, his, _mask(active, x))
    return x if target is x else x.copy_(target)


def pgd_step(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    *,
    step_size: PerSample,
    eps: PerSample,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    active: Tensor | None = None,  # [B] bool
) -> Tensor:
    """Out-of-place :func:`pgd_step_`: returns a new tensor in x's memory format."""
    x = x.detach().clone()
    return pgd_step_(
        x, grad, x0, step_size=step_size, eps=eps, norm=norm, bounds=bounds, sparsity=sparsity, active=active
    )


def project(
    x: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    *,
    eps: PerSample,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    active: Tensor | None = None,  # [B] bool
) -> Tensor:
    """Out-of-place :func:`project_`: returns a new tensor in x's memory format."""
    return project_(x.detach().clone(), x0, eps=eps, norm=norm, bounds=bounds, active=active)


def random_start(
    x0: Tensor,  # [B, ...]
    *,
    eps: PerSample,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points uniform in the eps ball around ``x0``, projected onto the box ``bounds``; [B, ...] like ``x0``.

    Random numbers are counter-based (Philox4x32-10, Salmon et al. 2011): the key is one draw from ``generator`` (the
    device's default generator if None), the counter is the sample's id and the element's index. With the same
    generator state and id a sample's start is the same in any batch, memory format and backend: bit for bit in "linf",
    to rounding in "l2" (Gaussian direction times U^(1/n)) and "l1" (signed exponentials E_i / sum of n + 1).

    Args:
        x0: centre of the ball, [B, ...].
        eps: radius of the ball in ``norm``, float or [B], finite and >= 0.
        norm: "linf", "l2" or "l1".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``x0``.
        ids: [B] int64 sample ids; 0 .. B-1 if None.
        generator: source of the key, advanced by one draw.

    Raises:
        ValueError: a shape, norm, layout or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
    """
    _check_tensor(x0, "x0")
    radius, radii = _radius(eps, x0)
    if math.isinf(radius):
        raise ValueError("eps must be finite for a random start")
    if ids is None:
        ids = torch.arange(x0.shape[0], device=x0.device)
    elif not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError("ids must be an int64 tensor")
    elif ids.shape != x0.shape[:1] or ids.device != x0.device:
        raise ValueError(f"ids must have shape [{x0.shape[0]}] on {x0.device}, got {_describe(ids)}")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    device = x0.device if generator is None else generator.device
    key = torch.randint(2**63 - 1, (1,), device=device, generator=generator).to(x0.device)
    (centre,) = _in_one_layout(x0.detach() if _known_layout(x0) else x0.detach().contiguous())
    lo, los, hi, his = _limits(bounds, centre)
    return _ops.random_start(centre, radius, radii, _norm(norm), lo, los, hi, his, ids.contiguous(), key)


@dataclass
class APGDState:
    """What :func:`apgd_step_` remembers of an attack, all of it on the device and changed in place.

    Everything is per sample, so rows may be gathered into a smaller state when samples are finished.
    """

    x_prev: Tensor
    """Iterate before the current one, [B, ...]."""
    x_best: Tensor
    """Iterate of the largest loss so far, [B, ...]."""
    grad_best: Tensor
    """Gradient there, [B, ...]."""
    best_loss: Tensor
    """Largest loss so far, [B], float64 for float64 x, else float32."""
    past_loss: Tensor
    """Loss of the last iterate and the largest one at the last checkpoint, [B, 2], like ``best_loss``."""
    step_size: Tensor
    """Length of the next step, [B], like ``best_loss``."""
    counters: Tensor
    """[B, 6] int32: steps taken; increases of the loss since the last checkpoint; whether that halved the step;
    elements that an "l1" step moves; support of x_best - x0 at the last checkpoint ("l1"); work space (0)."""
    schedule: Tensor
    """[steps] int32: where step k is a checkpoint, the steps since the last one; else 0. See apgd_schedule."""

    def __getitem__(self, samples: Tensor | slice) -> "APGDState":
        """State of some samples (bool mask [B], indices or slice; an int would drop the batch dimension)."""
        return APGDState(**{f.name: getattr(self, f.name)[samples] for f in fields(self)[:-1]}, schedule=self.schedule)


def apgd_schedule(steps: int, norm: Norm = "linf") -> list[int]:
    """Checkpoints of an APGD attack of ``steps`` steps: entry k > 0 is the steps since the last checkpoint, else 0.

    "linf" and "l2": at w_j = ceil(p_j steps) with p_0 = 0, p_1 = 0.22 and p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03,
    0.06) (Croce and Hein 2020, section 3). "l1": every 0.04 ``steps``, at least 1 (Croce and Hein 2021).

    Raises:
        ValueError: ``steps`` is negative or ``norm`` unknown.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    out = [0] * steps
    if _norm(norm) == "l1":
        window = max(steps // 25, 1)
        for k in range(window, steps, window):
            out[k] = window
        return out
    last, share, window = 0, 22, 22  # in hundredths
    while (k := -(-share * steps // 100)) < steps:
        if k > last:
            out[k], last = k - last, k
        window = max(window - 3, 6)
        share += window
    return out


def apgd_state(
    x: Tensor,  # [B, ...]
    *,
    steps: int,
    eps: PerSample,
    norm: Norm = "linf",
    step_size: PerSample | None = None,
) -> APGDState:
    """State of an APGD attack of ``steps`` steps that starts at ``x``: for this shape, dtype and memory layout.

    Args:
        x: the start, [B, ...]; only its form matters.
        steps: number of steps, for the schedule.
        eps: radius of the ball, float or [B].
        norm: "linf", "l2" or "l1".
        step_size: first step size, float or [B]; if None the published one, 2 eps for "linf" and "l2", eps for "l1".

    Raises:
        ValueError: a shape or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
    """
    _check_tensor(x, "x")
    radius, radii = _radius(eps, x)
    schedule = torch.tensor(apgd_schedule(steps, norm), dtype=torch.int32, device=x.device)
    arithmetic = compute_dtype(x.dtype)
    if step_size is None:
        scale = 1.0 if norm == "l1" else 2.0
        length, lengths = scale * radius, None if radii is None else scale * radii.clamp_min(0)
    else:
        length, lengths = _per_sample(step_size, x, "step_size")
        if not math.isfinite(length):
            raise ValueError(f"step_size must be finite, got {length}")
    batch, size = x.shape[0], math.prod(x.shape[1:])
    if size >= 2**31:
        raise ValueError(f"a sample of x must have less than 2**31 elements, got {size}")
    rows = torch.full((batch,), length, dtype=arithmetic, device=x.device)
    if lengths is not None:
        rows.copy_(lengths)
    (target,) = _in_one_layout(x.detach())
    like = [torch.empty_strided(x.shape, _dense_strides(target), dtype=x.dtype, device=x.device) for _ in range(3)]
    for t in like:
        t.zero_()
    counters = torch.zeros(batch, 6, dtype=torch.int32, device=x.device)
    counters[:, 3], counters[:, 4] = -(-size // 5), size  # a fifth of the elements, as published
    return APGDState(
        x_prev=like[0],
        x_best=like[1],
        grad_best=like[2],
        best_loss=torch.zeros_like(rows),
        past_loss=torch.zeros_like(rows)[:, None].repeat(1, 2),
        step_size=rows,
        counters=counters,
        schedule=schedule,
    )


def apgd_step_(
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    loss: Tensor,  # [B]
    x0: Tensor,  # [B, ...]
    state: APGDState,
    *,
    eps: PerSample,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    momentum: float = 0.75,
    rho: float = 0.75,
    active: Tensor | None = None,  # [B] bool
) -> Tensor:
    """One step of Auto-PGD, in place on ``x`` and ``state``; returns ``x``, the next iterate.

    With x = x^(k), the loss f(x^(k)) to be increased and its gradient there, each sample by itself:

    1. Best so far: where k = 0 or ``loss`` exceeds ``best_loss``, x_best, grad_best and best_loss take x, grad, loss.
    2. At a checkpoint (``state.schedule[k]`` = w > 0 steps since the last one), "linf" and "l2": if fewer than rho w of
       these steps increased the loss, or neither the step size nor the best loss has changed since the last checkpoint,
       the step size is halved and x, grad restart from x_best, grad_best (Croce and Hein 2020, Algorithm 1, conditions
       1 and 2). "l1" (Croce and Hein 2021): s = ||x_best - x0||_0; the step moves the ceil(s / 1.5) elements of the
       largest gradients from now on; if s has shrunk below 0.95 of what it was at the last checkpoint, x and grad
       restart from x_best and grad_best and the step size is eps again, else it is divided by 1.5, down to eps / 10.
    3. z = P(x + step_size * direction(grad)), directions and projections those of :func:`pgd_step_`. "linf", "l2" and
       k > 0: x <- P(x + momentum (z - x) + (1 - momentum) (x - x_prev)); otherwise x <- z. x_prev <- the x of step 3.

    After the last step, the last iterate has yet to be compared with ``x_best``. Differences from the AutoAttack code
    (and its copies) are where that departs from the paper: there condition 1 counts "at most", the second condition
    does not apply at the first checkpoint, losses after a restart are compared with the abandoned iterate, and the
    first window compares with a loss of 0; and its projections alternate between ball and box in "l2".

    Nothing here reads the device: a whole attack, or one step of it replayed, can be a CUDA graph.

    Args:
        x: current iterate, [B, ...], of the form that ``state`` was made for.
        grad: gradient of the loss, like ``x``; elements that are not finite count as 0.
        loss: loss at x, [B], any dtype that ``x`` may have; NaN counts as -inf.
        x0: centre of the ball, like ``x`` and in memory of its own; may be expanded along B.
        state: from :func:`apgd_state`.
        eps: radius of the ball in ``norm``, float or [B], >= 0; finite for "l1".
        norm: "linf", "l2" or "l1".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``x``.
        momentum: weight in [0, 1] of the step against the last update (alpha in the paper); unused in "l1".
        rho: share in [0, 1] of steps that must increase the loss; unused in "l1".
        active: [B] bool; False leaves a sample and its state as they are.

    Raises:
        ValueError: a shape, norm, layout or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
        RuntimeError: ``x`` requires grad while gradients are enabled.
    """
    if not isinstance(state, APGDState):
        raise TypeError(f"state must be an APGDState, got {type(state).__name__}")
    _check_inputs(x, grad=grad, x0=x0, x_prev=state.x_prev, x_best=state.x_best, grad_best=state.grad_best)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
    if loss.dtype not in _DTYPES:
        raise TypeError(f"loss must be float32, float64, float16 or bfloat16, got {_describe(loss)}")
    _, losses = _per_sample(loss, x, "loss")
    for name, value in (("momentum", momentum), ("rho", rho)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    radius, radii = _radius(eps, x)
    name = _norm(norm)
    if name == "l1" and math.isinf(radius):
        raise ValueError("eps must be finite for norm l1, whose step sizes it bounds")
    _check_state(state, x)
    target, grad, x0 = _in_one_layout(x, grad, x0)
    for buffer in (state.x_prev, state.x_best, state.grad_best):
        if not _same_layout(buffer, target) or (x.shape[0] > 1 and not _sample_dense(buffer)):
            raise ValueError("x must have the memory layout that state was made for")
    lo, los, hi, his = _limits(bounds, target)
    _ops.apgd_step_(
        target, grad, losses, x0, state.x_prev, state.x_best, state.grad_best, state.best_loss, state.past_loss,
        state.step_size, state.counters, state.schedule, radius, radii, name, lo, los, hi, his, momentum, rho,
        _mask(active, x),
    )  # fmt: skip
    return x if target is x else x.copy_(target)


def _check_state(state: APGDState, x: Tensor) -> None:
    arithmetic, batch = compute_dtype(x.dtype), x.shape[0]
    want = {
        "best_loss": ((batch,), arithmetic),
        "past_loss": ((batch, 2), arithmetic),
        "step_size": ((batch,), arithmetic),
        "counters": ((batch, 6), torch.int32),
        "schedule": (state.schedule.shape[:1], torch.int32),
    }
    for name, (shape, dtype) in want.items():
        t = getattr(state, name)
        if t.shape != shape or t.dtype != dtype or t.device != x.device or not t.is_contiguous():
            raise ValueError(
                f"state.{name} must be contiguous, {list(shape)} {str(dtype).removeprefix('torch.')} on {x.device}, "
                f"got {_describe(t)}"
            )


def _describe(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _check_tensor(t: Tensor, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {_describe(t)}")
    if t.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a scalar")


def _check_inputs(x: Tensor, **others: Tensor) -> None:
    _check_tensor(x, "x")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x requires grad; fastlip's steps are not differentiable: use torch.no_grad() or x.detach()")
    for name, t in others.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.shape != x.shape:
            raise ValueError(f"{name} must have x's shape {list(x.shape)}, got {list(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if not torch.compiler.is_compiling() and x.numel() and _begin_together(x, others["x0"]):
        raise ValueError("x0 must not share its memory with x, which is changed in place; clone one of them")


def _begin_together(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at one place of one storage; neither calls an operator nor looks at memory."""
    same: bool = x.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and bool(x.storage_offset() == other.storage_offset())


def _norm(norm: str) -> str:
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    return norm


def _per_sample(value: PerSample, x: Tensor, name: str) -> tuple[float, Tensor | None]:
    """A float, or 0.0 and the [B] tensor in the dtype of x's arithmetic."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float or a [B] tensor, got {type(value).__name__}")
        return float(value), None
    if value.shape != x.shape[:1] or value.device != x.device:
        raise ValueError(f"{name} must be a float or have shape [{x.shape[0]}] on {x.device}, got {_describe(value)}")
    return 0.0, value.detach().to(compute_dtype(x.dtype)).contiguous()


def _radius(eps: PerSample, x: Tensor) -> tuple[float, Tensor | None]:
    radius, radii = _per_sample(eps, x, "eps")
    if not radius >= 0.0:
        raise ValueError(f"eps must be at least 0, got {radius}")
    return radius, radii


def _mask(active: Tensor | None, x: Tensor) -> Tensor | None:
    if active is None:
        return None
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        raise TypeError("active must be a bool tensor")
    if active.shape != x.shape[:1] or active.device != x.device:
        raise ValueError(f"active must have shape [{x.shape[0]}] on {x.device}, got {_describe(active)}")
    return active.contiguous()


def _limits(bounds: Bounds, x: Tensor) -> tuple[float, Tensor | None, float, Tensor | None]:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError("bounds must be a pair (lower, upper)")
    lo, los = _limit(bounds[0], x)
    hi, his = _limit(bounds[1], x)
    if los is None and his is None and not lo <= hi:
        raise ValueError(f"bounds must satisfy lower <= upper, got ({lo}, {hi})")
    return lo, los, hi, his


def _limit(value: PerSample, x: Tensor) -> tuple[float, Tensor | None]:
    """A float, or 0.0 and a tensor [1 or B, *x.shape[1:]] in x's layout; one sample's worth unless B vary."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"bounds must be floats or tensors, got {type(value).__name__}")
        return float(value), None
    if value.device != x.device:
        raise ValueError(f"bounds must be on x's device {x.device}, got {value.device}")
    value = value.detach().to(compute_dtype(x.dtype))
    vary = value.dim() == x.dim() and value.shape[0] != 1
    try:
        value = value.expand(x.shape if vary else (1, *x.shape[1:]))
    except RuntimeError:
        raise ValueError(f"bounds must broadcast to x's shape {list(x.shape)}, got {list(value.shape)}") from None
    if value.stride()[1:] == x.stride()[1:] and (not vary or value.stride(0) == value[0].numel()):
        return 0.0, value
    return 0.0, torch.empty_strided(value.shape, _dense_strides(x), dtype=value.dtype, device=x.device).copy_(value)


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x's sample layout with the samples packed."""
    return (math.prod(x.shape[1:]), *x.stride()[1:])


def _sample_dense(x: Tensor) -> bool:
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


def _same_layout(t: Tensor, x: Tensor) -> bool:
    a, b = t.stride(), x.stride()
    return a == b or all(n == 1 or i == j for n, i, j in zip(x.shape[1:], a[1:], b[1:], strict=True))


def _in_one_layout(x: Tensor, *others: Tensor) -> list[Tensor]:
    """X with dense samples, and the others in its layout; a tensor that already fits is passed through."""
    if not _sample_dense(x):
        x = x.contiguous()
    fitted = [x]
    for t in others:
        t = t.detach() if t.requires_grad else t
        if not _same_layout(t, x):
            t = torch.empty_strided(t.shape, _dense_strides(x), dtype=t.dtype, device=t.device).copy_(t)
        fitted.append(t)
    return fitted


def _known_layout(x: Tensor) -> bool:
    """Whether a sample's logical index follows from its memory index: contiguous or channels_last."""
    if x.dim() < 3 or x[:1].is_contiguous():
        return x[:1].is_contiguous()
    last = x[:1].movedim(1, -1)
    return last.is_contiguous()
