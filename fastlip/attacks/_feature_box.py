"""Sets of perturbations with a radius for each feature, or features that must not move, as bounds."""

import math
from typing import Any

import torch
from torch import Tensor

from fastlip.attacks._arguments import check_broadcast, checked_inputs, plain, shown
from fastlip.ops import Bounds


def feature_box(
    inputs: Tensor,  # [B, ...]
    *,
    radius: float | Tensor = math.inf,
    mask: Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The ``bounds`` of perturbed inputs whose features move by at most their own ``radius``, and only in ``mask``.

    The result is {x' in bounds: |x'_i - x_i| <= radius_i, x'_i = x_i where mask_i is 0}, as the largest box of numbers
    of the inputs' dtype whose differences from ``inputs``, computed exactly, are within the radius. Any attack and
    :func:`evaluate` take it as their ``bounds``; a ball (``norm``, ``eps``) is intersected with it. In "linf" an
    ``eps`` of ``radius.max()`` leaves the radii alone to decide. A ``functools.partial`` of this function tells
    :func:`evaluate` the bounds of images that come in batches.

    Args:
        inputs: images, [B, ...], within ``bounds``.
        radius: largest change of each feature, >= 0, a float or a tensor that broadcasts to ``inputs``; inf leaves a
            feature to ``bounds``.
        mask: features that may move, bools or numbers that broadcast to ``inputs``, where 0 is one that may not; all
            may if None.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.

    Returns:
        Lower and upper limit, each [B, ...] like ``inputs``.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> mask = torch.tensor([True, False, False])[:, None, None]  # the first channel may change
        >>> box = attacks.feature_box(images, mask=mask, radius=0.1)
        >>> adversarial = attacks.pgd(model, images, labels, eps=0.1, bounds=box)
    """
    inputs, bounds = checked_inputs(inputs, bounds)
    radius = plain(radius)
    if not isinstance(radius, Tensor):
        if isinstance(radius, bool) or not isinstance(radius, (int, float)):
            raise TypeError(f"radius must be a float or a tensor, got {shown(radius)}")
        radius = torch.as_tensor(float(radius), dtype=torch.float64)
    radius = _broadcast(radius, inputs, "radius").double()
    if not bool((radius >= 0).all()):
        raise ValueError("radius must be at least 0 everywhere")
    if mask is not None:
        radius = torch.where(_broadcast(mask, inputs, "mask") != 0, radius, 0.0)
    lo, hi = (torch.as_tensor(b, dtype=inputs.dtype, device=inputs.device) for b in bounds)
    x = inputs.double()
    low, high = _rounded(x - radius, x, radius, inputs.dtype), _rounded(x + radius, x, radius, inputs.dtype)
    return torch.maximum(low, lo), torch.minimum(high, hi)


def _broadcast(values: Any, inputs: Tensor, name: str) -> Tensor:
    """``values`` on the device of ``inputs``, as far as they broadcast to them."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(values)}")
    check_broadcast(values, inputs, name)
    return values.detach().to(inputs.device)


def _rounded(limit: Tensor, x: Tensor, radius: Tensor, dtype: torch.dtype) -> Tensor:
    """``limit`` in ``dtype``, one number further towards ``x`` where rounding brought it beyond ``radius``."""
    near = limit.to(dtype)
    beyond = (near.double() - x).abs() > radius
    # On the CPU, where nextafter exists for every dtype.
    return torch.where(beyond, torch.nextafter(near.cpu(), x.to(dtype).cpu()).to(x.device), near)
