"""Auto-PGD's step, its state and its schedule."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastlip.ops._bindings import as_given, ball_as_given, read_and_saved, tried
from fastlip.ops._checks import (
    DTYPES,
    Bounds,
    Norm,
    PerSample,
    check_inputs,
    check_like,
    check_tensor,
    checked_ball,
    checked_mask,
    checked_norm,
    checked_radius,
    checked_saved,
    checked_step,
    dense_strides,
    describe,
    in_one_layout,
    per_sample,
    same_layout,
    sample_dense,
)
from fastlip.ops._model_input import NOT_READ, ModelInput, check_gradient, normalised
from fastlip.ops.reference import compute_dtype

_ops = torch.ops.fastlip


@dataclass
class APGDState:
    """The state of an attack by :func:`apgd_step_`, kept on the device and changed in place.

    All of it is per sample, so that rows can be gathered into a smaller state when samples are finished.
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

    Example:
        >>> from fastlip import ops
        >>> print(ops.apgd_schedule(100))  # at a checkpoint, the steps since the last one
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    out = [0] * steps
    if checked_norm(norm) == "l1":
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
    """The state of an APGD attack of ``steps`` steps that starts at ``x``, for its shape, dtype and memory layout.

    Args:
        x: the start, [B, ...]; only its shape, dtype and layout matter.
        steps: number of steps, for the schedule.
        eps: radius of the ball, float or [B].
        norm: "linf", "l2" or "l1".
        step_size: first step size, float or [B]; if None the published one, 2 eps for "linf" and "l2", eps for "l1".

    Raises:
        ValueError: a shape or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x = torch.rand(2, 3, 8, 8)
        >>> state = ops.apgd_state(x, steps=10, eps=8 / 255)
    """
    check_tensor(x, "x")
    radius, radii = checked_radius(eps, x)
    norm = checked_norm(norm)
    schedule = torch.tensor(apgd_schedule(steps, norm), dtype=torch.int32, device=x.device)
    arithmetic = compute_dtype(x.dtype)
    if step_size is None:
        scale = 1.0 if norm == "l1" else 2.0
        length, lengths = scale * radius, None if radii is None else scale * radii.clamp_min(0)
    else:
        length, lengths = checked_step(step_size, x)
    batch, size = x.shape[0], math.prod(x.shape[1:])
    if size >= 2**31:
        raise ValueError(f"a sample of x must have less than 2**31 elements, got {size}")
    rows = torch.full((batch,), length, dtype=arithmetic, device=x.device)
    if lengths is not None:
        rows.copy_(lengths)
    (target,) = in_one_layout(x.detach())
    like = [torch.empty_strided(x.shape, dense_strides(target), dtype=x.dtype, device=x.device) for _ in range(3)]
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
    model_input: ModelInput | None = None,
    best: Tensor | None = None,  # [B, ...]
    better: Tensor | None = None,  # [B] bool
    not_finite: Tensor | None = None,  # [B] bool
) -> Tensor:
    """One step of Auto-PGD, in place on ``x`` and ``state``; returns ``x``, the next iterate.

    With x = x^(k), the loss f(x^(k)) to be increased and its gradient at x, for each sample by itself:

    1. Best so far: where k = 0 or ``loss`` exceeds ``best_loss``, x_best, grad_best and best_loss take x, grad, loss.
    2. At a checkpoint (``state.schedule[k]`` = w > 0 steps since the last one), "linf" and "l2": if fewer than rho w of
       these steps increased the loss, or neither the step size nor the best loss has changed since the last checkpoint,
       the step size is halved and x, grad restart from x_best, grad_best (Croce and Hein 2020, Algorithm 1, conditions
       1 and 2). "l1" (Croce and Hein 2021): s = ||x_best - x0||_0; the step moves the ceil(s / 1.5) elements of the
       largest gradients from now on; if s has shrunk below 0.95 of what it was at the last checkpoint, x and grad
       restart from x_best and grad_best and the step size is eps again, else it is divided by 1.5, down to eps / 10.
    3. z = P(x + step_size * direction(grad)), directions and projections those of :func:`pgd_step_`. "linf", "l2" and
       k > 0: x <- P(x + momentum (z - x) + (1 - momentum) (x - x_prev)); otherwise x <- z. x_prev <- the x of step 3.

    After the last step, the last iterate has yet to be compared with ``x_best``. This differs from the AutoAttack code
    (and its copies) where that code departs from the paper: there condition 1 counts "at most", the second condition
    does not apply at the first checkpoint, losses after a restart are compared with those of the abandoned iterate, and
    the first window compares with a loss of 0. Its "l2" projections moreover alternate between ball and box.

    The step never synchronises with the device, so that a whole attack, or one step of it, can be a CUDA graph.

    Args:
        x: current iterate, [B, ...], of the shape, dtype and layout that ``state`` was made for.
        grad: gradient of the loss, like ``x``; elements that are not finite count as 0. With a ``model_input`` it is
            the gradient with respect to that, has its dtype, and is divided by its standard deviation here.
        loss: loss at x, [B], any dtype that ``x`` may have; NaN counts as -inf.
        x0: centre of the ball, like ``x`` and in memory of its own; may be expanded along B.
        state: from :func:`apgd_state`.
        eps: radius of the ball in ``norm``, float or [B], >= 0; finite for "l1".
        norm: "linf", "l2" or "l1".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``x``.
        momentum: weight in [0, 1] of the step against the last update (alpha in the paper); unused in "l1".
        rho: share in [0, 1] of steps that must increase the loss; unused in "l1".
        active: [B] bool; False leaves a sample and its state unchanged.
        model_input: the model's input (:func:`model_input`), rewritten in the same pass; ``x`` is then float32.
        best: the best iterates so far, like ``x`` and in its layout; takes x as it is before the step where ``better``.
        better: [B] bool (:attr:`Judgement.better`); goes with ``best``.
        not_finite: [B] bool; set where an element of ``grad`` is not finite, else left as it is.

    Raises:
        ValueError: a shape, norm, layout or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
        RuntimeError: ``x`` requires grad while gradients are enabled.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> grad = torch.randn_like(x0)
        >>> x = x0.clone()
        >>> state = ops.apgd_state(x, steps=10, eps=8 / 255)
        >>> ops.apgd_step_(x, grad, torch.zeros(2), x0, state, eps=8 / 255)
    """
    if not isinstance(state, APGDState):
        raise TypeError(f"state must be an APGDState, got {type(state).__name__}")
    buffers = {"x_prev": state.x_prev, "x_best": state.x_best, "grad_best": state.grad_best}
    numbers = (state.best_loss, state.past_loss, state.step_size, state.counters, state.schedule)
    given = as_given(x, grad, loss, x0, model_input=model_input)
    if given and grad.stride() == x.stride() and loss.dtype == state.best_loss.dtype:
        ball, rest = ball_as_given(eps, norm, bounds, x), read_and_saved(model_input, best, better, not_finite)
        tensors = (x, grad, loss, x0, *buffers.values(), *numbers)
        if ball and tried(_ops.apgd_step_, *tensors, *ball, momentum, rho, active, *rest):
            return x
    check_inputs(x, x0=x0, **buffers)
    if model_input is None:
        check_like(grad, x, "grad")
    else:
        check_gradient(grad, x, model_input)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
    if loss.dtype not in DTYPES:
        raise TypeError(f"loss must be float32, float64, float16 or bfloat16, got {describe(loss)}")
    _, losses = per_sample(loss, x, "loss")
    for name, value in (("momentum", momentum), ("rho", rho)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    _check_state(state, x)
    active = checked_mask(active, x)
    target, grad, x0 = in_one_layout(x, grad, x0)
    for buffer in buffers.values():
        if not same_layout(buffer, target) or (x.shape[0] > 1 and not sample_dense(buffer)):
            raise ValueError("x must have the memory layout that state was made for")
    ball = checked_ball(eps, norm, bounds, target)
    if ball.norm == "l1" and math.isinf(ball.eps):
        raise ValueError("eps must be finite for norm l1, whose step sizes it bounds")
    read = NOT_READ if model_input is None else normalised(model_input, target)
    beside = {"x": x, "grad": grad, "x0": x0, **buffers}
    if model_input is not None:
        beside["model_input"] = model_input.values
    saved = checked_saved(best, better, not_finite, target, active, **beside)
    _ops.apgd_step_(target, grad, losses, x0, *buffers.values(), *numbers, *ball, momentum, rho, active, *read, *saved)
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
                f"got {describe(t)}"
            )
