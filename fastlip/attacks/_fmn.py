"""Fast minimum-norm attack (Pintor et al. 2021): a ball for each image that shrinks on success and grows on failure."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch, per_sample
from fastlip.attacks._distance import distance, slope
from fastlip.attacks._loop import AttackLoop, unblocked_gradient

#: Shares by which a ball shrinks or grows in the first and in the last step.
_GAMMA = (0.1, 0.001)
#: Share of the steps that take the steepest direction, and their length over the ball's radius, first and last.
_STEEPEST, _STEP = 0.1, (2.0, 0.01)
#: Length of the other steps, along the gradient, over that of the perturbation in L2, first and last.
_ALONG = (4.0, 0.01)
#: Temperatures of the smooth margin over the spread of the logits: with which each run begins, and all end.
_TEMPERATURES, _LAST_TEMPERATURE = (0.25, 1.0, 0.05, 0.5), 0.05
#: Steps of each of several runs, at least.
_RUN = 200
#: Rounding error of a projection, relative to the radius.
_SLACK = 1e-6
#: Factor by which a ball grows until its image has been adversarial for the first time.
_GROWTH = 1.1


def fmn(
    loop: AttackLoop,
    batch: Batch,
    first: Tensor,  # [K] float64
    limit: Tensor,  # [K] float64
    steps: int,
    sparsity: float,
) -> tuple[Tensor, Tensor]:
    """The nearest misclassified iterates, [K, ...] in the inputs' dtype, and their distances, [K] float64 (inf: none).

    The radius shrinks by gamma at a misclassified iterate and grows by gamma at any other, and gamma falls along half a
    cosine as published. Departures from the paper: projections onto ball and box are exact; the first tenth of the
    steps takes the norm's own steepest direction, which gets far, and the others follow the gradient, which converges
    where the steepest direction of "linf" and "l1" only alternates its signs; the length of a step is relative to the
    ball and the perturbation, so that nothing depends on the scale of the inputs; a margin (the losses "margin" and
    "dlr") is followed in a smooth form, because its own gradient leads to the class that is nearest at first and jumps
    between classes later; and any loss can be followed, because the linearised margin gives the first radius only.
    Of many steps a single run makes little use: they are shared among runs of 200 steps or more, up to four, which
    begin with margins of different smoothness, end at different classes, and of which the nearest counts.

    Args:
        loop: the network, the norm and the loss.
        batch: images that are classified correctly.
        first: radius to begin with.
        limit: largest radius of interest.
        steps: gradient steps.
        sparsity: share of elements that an "l1" step leaves alone.
    """
    runs = min(max(steps // _RUN, 1), len(_TEMPERATURES)) if loop.loss in ("margin", "dlr") else 1
    best, nearest = batch.x0.to(loop.dtype), torch.full_like(limit, torch.inf)
    for run in range(runs):
        now = steps // runs + (run < steps % runs)
        found, length = _run(loop, batch, first, limit, now, sparsity, (_TEMPERATURES[run], _LAST_TEMPERATURE))
        best = torch.where(per_sample(length < nearest, best), found, best)
        nearest = torch.minimum(nearest, length)
    return best, nearest


def _run(
    loop: AttackLoop,
    batch: Batch,
    first: Tensor,  # [K] float64
    limit: Tensor,  # [K] float64
    steps: int,
    sparsity: float,
    temperature: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """What :func:`fmn` returns, of one run, whose margin has temperatures from the first to the last given."""
    x, best = batch.x0.clone(), batch.x0.to(loop.dtype)
    nearest = torch.full_like(limit, torch.inf)
    radius = torch.minimum(first, limit)
    for step in range(steps + 1):
        image, logits, judgement = loop.forward(replace(batch, eps=radius), x, gradient=step < steps)
        # Of values on a grid none may lie just beyond one that decides too closely, so that only firm decisions count.
        if loop.network.exact:
            adversarial = loop.decision(batch, logits.detach(), firm=True)
        else:
            wrong = judgement.adversarial
            adversarial = loop.asked(batch, image.detach(), wrong, wrong, firm=True)
        length = distance(image.detach(), batch.x0.to(image.dtype), loop.norm)
        better = adversarial & (length < nearest) & (length <= limit * (1 + _SLACK))
        best = torch.where(per_sample(better, x), image.detach(), best)
        nearest = torch.where(better, length, nearest)
        if step == steps:
            break
        if loop.loss in ("margin", "dlr"):
            uphill = _smooth_margin_gradient(logits.detach(), batch, _annealed(temperature, step, steps))
            judgement = judgement._replace(grad=uphill)
        grad = loop.backward(image, logits, judgement)
        loop.not_finite[batch.rows] |= ~grad.flatten(1).isfinite().all(1)
        gamma = _annealed(_GAMMA, step, steps)
        if step:
            grown = torch.where(nearest.isfinite(), radius * (1 + gamma), radius * _GROWTH)
            radius = torch.minimum(torch.where(adversarial, torch.minimum(radius * (1 - gamma), nearest), grown), limit)
        if loop.norm == "l1":
            grad = unblocked_gradient(batch, x, grad)
        if step < _STEEPEST * steps:
            length = _annealed(_STEP, step, steps) * radius
            ops.pgd_step_(
                x, grad, batch.x0, step_size=length, eps=radius, norm=loop.norm, bounds=batch.bounds, sparsity=sparsity
            )
        else:
            span = torch.maximum(distance(x, batch.x0, "l2"), radius / max(x.shape[1:].numel(), 1) ** 0.5)
            steepness = slope(grad, "l2")
            share = torch.where(steepness > 0, _annealed(_ALONG, step, steps) * span / steepness, 0.0)
            moved = x + per_sample(share, x) * grad.nan_to_num(0, 0, 0)
            x = ops.project_(moved.to(x.dtype), batch.x0, eps=radius, norm=loop.norm, bounds=batch.bounds)
    return best, nearest


def _smooth_margin_gradient(
    logits: Tensor,  # [B, C]
    batch: Batch,
    temperature: float,
) -> Tensor:
    """Gradient of T log sum exp(z_c / T) - z_y over the classes c other than y with respect to the logits z, [B, C].

    T is ``temperature`` times the standard deviation of an image's logits; where it is 0 this is the margin. With
    targets y is the target and the sign is the opposite.
    """
    own = (batch.labels if batch.targets is None else batch.targets)[:, None]
    z = logits.double()
    excluded = z == -torch.inf
    classes = (~excluded).sum(1, keepdim=True)
    middle = z.masked_fill(excluded, 0).sum(1, keepdim=True) / classes
    spread = ((z - middle).masked_fill(excluded, 0).square().sum(1, keepdim=True) / classes).sqrt()
    others = z.scatter(1, own, -torch.inf)
    others = others - others.amax(1, keepdim=True)
    weights = (others / (temperature * spread).clamp_min(torch.finfo(z.dtype).tiny)).softmax(1)
    grad = weights.scatter(1, own, -1.0).to(logits.dtype)
    return grad if batch.targets is None else -grad


def _annealed(ends: tuple[float, float], step: int, steps: int) -> float:
    """The value at ``step`` on half a cosine from the first of ``ends`` to the last."""
    first, last = ends
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
