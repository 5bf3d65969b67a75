"""Losses that attacks climb, one number per image."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastlip.attacks._arguments import check_choice

Loss = Literal["dlr", "ce", "margin"]


def attack_loss(
    name: str,
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    targets: Tensor | None,  # [B]
    toward: Tensor | None = None,  # [B]
) -> Tensor:
    """Loss to be increased, [B]: away from ``labels``, to ``targets``, or away from ``labels`` in favour of ``toward``.

    To a target "dlr" is the margin: a target far from the top would be "approached" by widening the spread. The
    margin's direction does not depend on the logits' scale either.
    """
    if toward is not None:
        return _PAIRED[name](logits, labels, toward)
    if targets is None:
        return _LOSSES[name](logits, labels)
    return -_LOSSES["margin" if name == "dlr" else name](logits, targets)


def check_loss(name: str) -> None:
    """Raise where the loss is none of those known."""
    check_choice(name, "loss", tuple(_LOSSES))


def succeeded(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    targets: Tensor | None,  # [B]
) -> Tensor:
    """Whether the decision is wrong (or the target's), [B] bool; logits that hold a NaN decide nothing."""
    decision = logits.argmax(1)
    hit = decision != labels if targets is None else decision == targets
    return hit & ~logits.isnan().any(1)


def undecided(
    logits: Tensor,  # [B, C]
    rounding: float,
) -> Tensor:
    """Whether errors up to ``rounding``, relative to the logits' spread, could change the decision, [B] bool."""
    top = logits.topk(2, dim=1).values
    return ~(top[:, 0] - top[:, 1] > 2 * rounding * (top[:, 0] - logits.amin(1)))


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


def _margin_of(logits: Tensor, classes: Tensor, toward: Tensor) -> Tensor:
    """Logit of ``toward`` minus that of ``classes``, [B]."""
    return (logits.gather(1, toward[:, None]) - logits.gather(1, classes[:, None])).squeeze(1)


def _dlr_of(logits: Tensor, classes: Tensor, toward: Tensor) -> Tensor:
    """The targeted form of DLR (Croce and Hein 2020, equation 7); the margin below four classes."""
    margin = _margin_of(logits, classes, toward)
    if logits.shape[1] < 4:
        return margin
    top = logits.topk(4, dim=1).values
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return margin / torch.where(spread > 0, spread, 1)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dlr": dlr_loss,
    "ce": _cross_entropy,
    "margin": margin_loss,
}
_PAIRED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dlr": _dlr_of,
    "ce": lambda logits, classes, toward: -_cross_entropy(logits, toward),
    "margin": _margin_of,
}
