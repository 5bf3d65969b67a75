"""A loss of the caller's own in the place of those that the operators know."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch
from fastlip.ops import BestRecord, Judgement, Loss

#: Maps logits [B, C] and classes [B] to the losses to be increased, [B].
LossFunction = Callable[[Tensor, Tensor], Tensor]
AnyLoss = Loss | LossFunction


def judged_by(
    loss: LossFunction,
    logits: Tensor,  # [B, C]
    batch: Batch,
    rounding: float,
    record: BestRecord | None,
) -> Judgement:
    """What :func:`fastlip.ops.judge` says, with the loss and gradient of ``loss``.

    Raises:
        ValueError: ``loss`` does not return a number for each image that depends on its logits.
    """
    verdict = ops.judge(logits, batch.labels, targets=batch.targets, loss="margin", rounding=rounding)
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
    better = verdict.better
    if record is not None:
        better = record.update(value.double(), verdict.adversarial, verdict.doubtful)
    return Judgement(value.to(logits.dtype), grad, verdict.adversarial, verdict.doubtful, better)
