"""Projected gradient steps, projections and random starts, in place and out of place."""

import math

import torch
from torch import Tensor

from fastlip.ops._bindings import as_given, ball_as_given, number_as_given, read_and_saved, tried
from fastlip.ops._checks import (
    Bounds,
    Norm,
    PerSample,
    check_inputs,
    check_like,
    check_tensor,
    checked_ball,
    checked_mask,
    checked_saved,
    checked_step,
    describe,
    in_one_layout,
    known_layout,
)
from fastlip.ops._model_input import NOT_READ, ModelInput, check_gradient, normalised

_ops = torch.ops.fastlip


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
    model_input: ModelInput | None = None,
    best: Tensor | None = None,  # [B, ...]
    better: Tensor | None = None,  # [B] bool
    not_finite: Tensor | None = None,  # [B] bool
) -> Tensor:
    """One projected gradient ascent step, in place: x <- P(x + step_size * direction(grad)); returns ``x``.

    The direction has unit norm: sign(grad) for "linf"; grad / ||grad||_2 for "l2"; for "l1" the signs of the
    elements whose magnitude reaches the ``sparsity`` quantile (ties kept, at least one element), divided by their
    number (Tramer and Boneh 2019, SLIDE; one-hot at ``sparsity=1``). A zero gradient moves nothing. P is the exact
    Euclidean projection onto the intersection of the eps ball around ``x0`` with the box ``bounds``, not an alternation
    of the two. "linf" is bit for bit the step of torchattacks' PGD (Madry et al. 2018) on finite gradients.

    Args:
        x: current iterate, [B, ...].
        grad: gradient of the loss to be increased, like ``x``. With a ``model_input`` it is the gradient with respect
            to that, has its dtype, and is divided by its standard deviation here.
        x0: centre of the ball, like ``x`` and in memory of its own; may be expanded along B.
        step_size: length of the step in the units of ``x``, float or [B]; negative descends.
        eps: radius of the ball in ``norm``, float or [B], >= 0; ``inf`` leaves only the box.
        norm: "linf", "l2" or "l1".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``x``.
        sparsity: share of elements in [0, 1] that an "l1" step leaves alone.
        active: [B] bool; False leaves a sample unchanged.
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
        >>> x = ops.random_start(x0, eps=8 / 255)
        >>> ops.pgd_step_(x, grad, x0, step_size=2 / 255, eps=8 / 255)
    """
    if as_given(x, grad, x0, model_input=model_input) and grad.stride() == x.stride():
        step, ball = number_as_given(step_size, x), ball_as_given(eps, norm, bounds, x)
        rest = read_and_saved(model_input, best, better, not_finite)
        if step and ball and tried(_ops.pgd_step_, x, grad, x0, *step, *ball, sparsity, active, *rest):
            return x
    check_inputs(x, x0=x0)
    if model_input is None:
        check_like(grad, x, "grad")
    else:
        check_gradient(grad, x, model_input)
    step = checked_step(step_size, x)
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    active = checked_mask(active, x)
    target, grad, x0 = in_one_layout(x, grad, x0)
    ball = checked_ball(eps, norm, bounds, target)
    read = NOT_READ if model_input is None else normalised(model_input, target)
    beside = {"x": x, "grad": grad, "x0": x0}
    if model_input is not None:
        beside["model_input"] = model_input.values
    saved = checked_saved(best, better, not_finite, target, active, **beside)
    _ops.pgd_step_(target, grad, x0, *step, *ball, sparsity, active, *read, *saved)
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
        active: [B] bool; False leaves a sample unchanged.

    Raises:
        ValueError: a shape, norm, layout or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
        RuntimeError: ``x`` requires grad while gradients are enabled.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> grad = torch.randn_like(x0)
        >>> x = x0 + grad
        >>> ops.project_(x, x0, eps=0.5, norm="l2")
    """
    if as_given(x, x0):
        ball = ball_as_given(eps, norm, bounds, x)
        if ball and tried(_ops.project_, x, x0, *ball, active):
            return x
    check_inputs(x, x0=x0)
    active = checked_mask(active, x)
    target, x0 = in_one_layout(x, x0)
    _ops.project_(target, x0, *checked_ball(eps, norm, bounds, target), active)
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
    """Out-of-place :func:`pgd_step_`: returns a new tensor in x's memory format.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> grad = torch.randn_like(x0)
        >>> moved = ops.pgd_step(x0, grad, x0, step_size=0.1, eps=0.5, norm="l2")
    """
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
    """Out-of-place :func:`project_`: returns a new tensor in x's memory format.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> grad = torch.randn_like(x0)
        >>> projected = ops.project(x0 + grad, x0, eps=0.5, norm="l1")
    """
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

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x = ops.random_start(torch.rand(2, 3, 8, 8), eps=8 / 255, generator=torch.Generator().manual_seed(0))
    """
    check_tensor(x0, "x0")
    if ids is None:
        ids = torch.arange(x0.shape[0], device=x0.device)
    elif not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError("ids must be an int64 tensor")
    elif ids.shape != x0.shape[:1] or ids.device != x0.device:
        raise ValueError(f"ids must have shape [{x0.shape[0]}] on {x0.device}, got {describe(ids)}")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    (centre,) = in_one_layout(x0.detach() if known_layout(x0) else x0.detach().contiguous())
    ball = checked_ball(eps, norm, bounds, centre)
    if math.isinf(ball.eps):
        raise ValueError("eps must be finite for a random start")
    device = x0.device if generator is None else generator.device
    key = torch.randint(2**63 - 1, (1,), device=device, generator=generator).to(x0.device)
    return _ops.random_start(centre, *ball, ids.contiguous(), key)
