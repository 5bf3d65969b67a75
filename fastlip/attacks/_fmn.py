"""Fast minimum-norm attack (Pintor et al. 2021): a ball for each image that shrinks on success and grows on failure."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch, take
from fastlip.attacks._climb import Climb, free_gradient
from fastlip.attacks._distance import distance, slope

#: Share by which a ball shrinks or grows at first and at last.
_GAMMA = (0.05, 0.001)
#: Share of the steps that are steepest ones, and their length over the ball's radius, at first and at last.
_STEEPEST, _STEP = 0.25, (2.0, 0.01)
#: Length of the others, along the gradient, over that of the perturbation in L2.
_ALONG = (4.0, 0.01)
#: Rounding of a projection, relative to the radius.
_SLACK = 1e-6
#: Factor by which a ball grows until its image has fallen for the first time.
_GROWTH = 1.1


def fmn(
    climb: Climb,
    batch: Batch,
    first: Tensor,  # [K] float64
    limit: Tensor,  # [K] float64
    steps: int,
    sparsity: float,
) -> tuple[Tensor, Tensor]:
    """The nearest misclassified iterates, [K, ...] in the inputs' dtype, and their distances, [K] float64 (inf: none).

    The radius shrinks by gamma at a misclassified iterate and grows by gamma at another, gamma falling along half a
    cosine as published. Departures from the paper: projections are exact on ball and box; a quarter of the steps have
    the norm's own steepest direction, which goes far, before they follow the gradient, which settles where the steepest
    direction of "linf" and "l1" only changes signs; steps have a length relative to the ball and the perturbation, so
    that nothing depends on the scale of the inputs; and any loss can be followed, the linearised margin giving the
    first radius only.

    Args:
        climb: the network, the norm and the loss.
        batch: images that are classified correctly.
        first: radius to begin with.
        limit: largest radius of interest.
        steps: gradient steps.
        sparsity: share of elements that an "l1" step leaves alone.
    """
    x = batch.x0.clone()
    best = take(climb.result, batch.rows)
    nearest = torch.full_like(limit, torch.inf)
    radius = torch.minimum(first, limit)
    for step in range(steps + 1):
        seen = climb.seen(replace(batch, eps=radius), x)
        losses, hit = climb.look(batch, seen, gradient=step < steps)
        length = distance(seen.detach(), batch.x0.to(seen.dtype), climb.norm)
        better = hit & (length < nearest) & (length <= limit * (1 + _SLACK))
        best = torch.where(better.reshape(-1, *([1] * (x.dim() - 1))), seen.detach(), best)
        nearest = torch.where(better, length, nearest)
        if step == steps:
            break
        grad = climb.gradient(losses, seen, x)
        gamma = _annealed(_GAMMA, step, steps)
        if step:
            grown = torch.where(nearest.isfinite(), radius * (1 + gamma), radius * _GROWTH)
            radius = torch.minimum(torch.where(hit, torch.minimum(radius * (1 - gamma), nearest), grown), limit)
        if climb.norm == "l1":
            grad = free_gradient(batch, x, grad)
        if step < _STEEPEST * steps:
            length = _annealed(_STEP, step, steps) * radius
            ops.pgd_step_(
                x, grad, batch.x0, step_size=length, eps=radius, norm=climb.norm, bounds=batch.bounds, sparsity=sparsity
            )
        else:
            span = torch.maximum(distance(x, batch.x0, "l2"), radius / max(x.shape[1:].numel(), 1) ** 0.5)
            steepness = slope(grad, "l2")
            share = torch.where(steepness > 0, _annealed(_ALONG, step, steps) * span / steepness, 0.0)
            moved = x + share.reshape(-1, *([1] * (x.dim() - 1))) * grad.nan_to_num(0, 0, 0)
            x = ops.project_(moved.to(x.dtype), batch.x0, eps=radius, norm=climb.norm, bounds=batch.bounds)
    return best, nearest


def _annealed(ends: tuple[float, float], step: int, steps: int) -> float:
    """From the first to the last along half a cosine."""
    first, last = ends
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
