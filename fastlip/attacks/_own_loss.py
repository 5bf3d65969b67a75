"""A loss or a criterion of the caller's own in the place of those that the operators know."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch
from fastlip.attacks._criterion import Criterion, fooled, holds_within, spread
from fastlip.ops import BestRecord, Judgement, Loss

#: Maps logits [B, C] and classes [B] to the losses to be increased, [B].
LossFunction = Callable[[Tensor, Tensor], Tensor]
AnyLoss = Loss | LossFunction


def judged_by(
    loss: AnyLoss,
    criterion: Criterion | None,
    logits: Tensor,  # [B, C]
    batch: Batch,
    rounding: float,
    record: BestRecord | None,
) -> Judgement:
    """What :func:`fastlip.ops.judge` says, with the loss and gradient of ``loss`` and the decision of ``criterion``.

    Raises:
        ValueError: ``loss`` does not return a number for each image that depends on its logits, or ``criterion`` no
            bool for each image.
    """
    known: Loss = loss if isinstance(loss, str) else "margin"
    toward = batch.toward if isinstance(loss, str) else None
    found = ops.judge(logits, batch.labels, targets=batch.targets, toward=toward, loss=known, rounding=rounding)
    value, grad = (found.loss, found.grad) if isinstance(loss, str) else _value_and_gradient(loss, logits, batch)
    adversarial, doubtful = found.adversarial, found.doubtful
    if criterion is not None:
        adversarial = fooled(criterion, logits, batch.labels)
        if 0 < rounding < torch.inf:  # an infinite error leaves every decision in doubt, as it is
            error = rounding * spread(logits.detach())
            doubtful = ~holds_within(criterion, logits.detach(), batch.labels, adversarial, error)
    better = found.better
    if record is not None:
        better = record.update(value.double(), adversarial, doubtful)
    return Judgement(value.to(logits.dtype), grad, adversarial, doubtful, better)


def _value_and_gradient(loss: LossFunction, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses to be increased, [B], and their gradients with respect to the logits, [B, C]."""
    classes, away = (batch.labels, True) if batch.targets is None else (batch.targets, False)
    if batch.toward is not None:
        classes, away = batch.toward, False
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        values = loss(z, classes)
        if not isinstance(values, Tensor) or values.shape != classes.shape or not values.is_floating_point():
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"loss must return a number for each image, [{len(z)}] (reduction='none'), got {got}")
        if not values.requires_grad:
            raise ValueError("loss must depend differentiably on the logits")
        (grad,) = torch.autograd.grad(values.sum() if away else -values.sum(), z)
    value = values.detach() if away else -values.detach()
    return value, grad
