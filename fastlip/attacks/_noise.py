"""Gaussian noise, the random perturbation that adversarial ones are compared with."""

import math

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import check_generator, checked_inputs, checked_integers, radius
from fastlip.attacks._batch import per_sample, wide_dtype
from fastlip.ops import Bounds, PerSample

#: Scales noise beyond any ball of interest, so that its length is that of the projection.
_FAR = 1e4


def gaussian_noise(
    inputs: Tensor,  # [B, ...]
    *,
    sigma: PerSample | None = None,
    norm: PerSample | None = None,
    bounds: Bounds = (0.0, 1.0),
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
) -> Tensor:
    """``inputs`` with white Gaussian noise, clipped to ``bounds``; [B, ...] like ``inputs``.

    The random numbers are counter-based, as in :func:`fastlip.ops.random_start`: with the same generator state and id
    an image has the same noise in any batch.

    Args:
        inputs: images, [B, ...], within ``bounds``.
        sigma: standard deviation of the noise before clipping, in the units of ``inputs``, float or [B], >= 0.
        norm: instead of ``sigma``, the L2 norm of the perturbation *after* clipping, float or [B]: the noise is
            clip(s z) with the s that reaches this norm, or at the bounds everywhere where the box is too small for it.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        ids: [B] int64 sample ids; 0 .. B-1 if None.
        generator: source of the noise, advanced by one draw; the device's default generator if None.

    Raises:
        ValueError: not exactly one of ``sigma`` and ``norm`` is given, a value or shape is wrong, or inputs leave the
            bounds.
        TypeError: a type or dtype is wrong.

    Example:
        >>> import torch
        >>> from fastlip import attacks
        >>> images = torch.rand(2, 3, 8, 8)
        >>> noisy = attacks.gaussian_noise(images, norm=0.5)
    """
    if (sigma is None) == (norm is None):
        raise ValueError("give either sigma or norm")
    inputs, bounds = checked_inputs(inputs, bounds)
    check_generator(generator)
    ids = None if ids is None else checked_integers(ids, "ids", inputs)
    x0 = inputs.detach().to(wide_dtype(inputs))
    if norm is not None:
        norm = radius(norm, "norm", inputs)
        z = standard_normal(x0, ids=ids, generator=generator)
        moved = ops.project_(x0 + _FAR * z, x0, eps=norm, norm="l2", bounds=bounds)
        return moved.to(inputs.dtype)
    sigma = radius(sigma, "sigma", inputs, finite="and at least 0")
    z = standard_normal(x0, ids=ids, generator=generator)
    return add_noise(x0, z, sigma, bounds).to(inputs.dtype)


def standard_normal(
    like: Tensor,  # [B, ...]
    *,
    ids: Tensor | None,  # [B] int64
    generator: torch.Generator | None,
) -> Tensor:
    """Independent standard normal elements in like's shape and dtype, float32 or float64."""
    centre = torch.zeros_like(like)
    uniform = ops.random_start(
        centre, eps=1.0, norm="linf", bounds=(-math.inf, math.inf), ids=ids, generator=generator
    ).double()
    # The starts lie on a grid of 2^-23 (float64: 2^-52) from -1 up to 1 exclusive: its midpoints are symmetric.
    half = 2.0**-53 if like.dtype == torch.float64 else 2.0**-24
    return (math.sqrt(2.0) * torch.erfinv(uniform + half)).to(like.dtype)


def add_noise(
    x0: Tensor,  # [B, ...]
    z: Tensor,  # [B, ...]
    sigma: PerSample,
    bounds: Bounds,
) -> Tensor:
    """x0 + sigma z, clipped to ``bounds``."""
    if isinstance(sigma, Tensor):
        sigma = per_sample(sigma.to(x0.dtype), x0)
    lo, hi = (torch.as_tensor(b, dtype=x0.dtype, device=x0.device) for b in bounds)
    return torch.minimum(torch.maximum(x0 + sigma * z, lo), hi)
