"""Losses that attacks climb, one number per image."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Loss = Literal["dlr", "ce", "margin"]


def attack_loss(
    name: str,
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    targets: Tensor | None,  # [B]
) -> Tensor:
    """Loss to be increased, [B]: away from ``labels``, or towards ``targets`` where given.

    Towards a target "dlr" is the margin: a target far from the top would be "approached" by widening the spread. The
    margin's direction does not depend on the logits' scale either.
    """
    if targets is None:
        return _LOSSES[name](logits, labels)
    return -_LOSSES["margin" if name == "dlr" else name](logits, targets)


def check_loss(name: str) -> None:
    if name not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {name!r}")


def succeeded(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    targets: Tensor | None,  # [B]
) -> Tensor:
    """Whether the decision is wrong (or the target's), [B] bool; logits that hold a NaN decide nothing."""
    decision = logits.argmax(1)
    hit = decision != labels if targets is None else decision == targets
    return hit & ~logits.isnan().any(1)


def margin_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Largest other logit minus that of ``classes``, [B]; positive where another class wins."""
    own = logits.gather(1, classes[:, None]).squeeze(1)
    return logits.scatter(1, classes[:, None], -torch.inf).amax(1) - own


def dlr_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Margin over the spread of the three largest logits (Croce and Hein 2020): invariant to shift and scale.

    With fewer than three classes there is no third logit, and it is the margin.
    """
    if logits.shape[1] < 3:
        return margin_loss(logits, classes)
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2]
    return margin_loss(logits, classes) / torch.where(spread > 0, spread, 1)


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return functional.cross_entropy(logits, classes, reduction="none")


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dlr": dlr_loss,
    "ce": _cross_entropy,
    "margin": margin_loss,
}
