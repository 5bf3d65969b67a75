"""What counts as success: a wrong decision, or a criterion of the caller's own."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlip import ops

#: Maps logits [B, C] and labels [B] to whether the model is fooled, [B] bool.
Criterion = Callable[[Tensor, Tensor], Tensor]


def check_criterion(criterion: object) -> None:
    """Raise where ``criterion`` is neither a function nor None; a class is refused, since only its instances are."""
    if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
        kind = criterion.__name__ if isinstance(criterion, type) else type(criterion).__name__
        raise TypeError(f"criterion must be a function (logits, labels) -> bool [B] or None, got {kind}")


def fooled(
    criterion: Criterion | None,
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B] int64
) -> Tensor:
    """Whether the model is fooled, [B] bool: by a wrong decision if ``criterion`` is None; never by logits with a NaN.

    Raises:
        ValueError: ``criterion`` does not return a bool for each image.
    """
    if criterion is None:
        return ops.judge(logits, labels).adversarial
    logits = logits.detach()
    said = criterion(logits, labels)
    if not isinstance(said, Tensor) or said.dtype != torch.bool or said.shape != labels.shape:
        got = f"{said.dtype} {list(said.shape)}" if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(f"criterion must return a bool for each image, [{len(labels)}], got {got}")
    return said.to(logits.device) & ~logits.isnan().any(1)


def holds_within(
    criterion: Criterion,
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B] int64
    said: Tensor,  # [B] bool
    rounding: Tensor,  # [B]
) -> Tensor:
    """Whether ``criterion`` says the same where logits err by ``rounding``, [B] bool.

    Nothing is known of the criterion, so that a few errors stand for all: those that favour one class against all
    others, or disfavour it, for the label, the largest and the second largest logit.
    """
    first, second = logits.topk(2, dim=1).indices.unbind(1)
    same = torch.ones_like(said)
    for favoured in (labels, first, second):
        error = torch.full_like(logits, -1.0).scatter_(1, favoured[:, None], 1.0) * rounding[:, None].to(logits.dtype)
        for moved in (logits + error, logits - error):
            same &= fooled(criterion, moved, labels) == said
    return same


def spread(
    logits: Tensor,  # [B, C]
) -> Tensor:
    """Difference of the largest and the smallest logit, [B]; -inf excludes a class."""
    return logits.amax(1) - logits.masked_fill(logits == -torch.inf, torch.inf).amin(1)
