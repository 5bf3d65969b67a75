"""What an attack reads off logits in one pass: loss, gradient, decision, and which iterates are the best so far."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastlip.ops._checks import describe
from fastlip.ops._schemas import Best

_ops = torch.ops.fastlip

Loss = Literal["dlr", "ce", "margin"]
LOSSES = ("dlr", "ce", "margin")


class Judgement(NamedTuple):
    """What :func:`judge` says of each image."""

    loss: Tensor
    """The loss to be increased, [B] like the logits; NaN where logits hold a NaN or a class does not exist."""
    grad: Tensor
    """Its gradient with respect to the logits, [B, C] like them."""
    adversarial: Tensor
    """Whether the decision is wrong (with targets: the target), [B] bool; logits with a NaN make no decision."""
    doubtful: Tensor
    """Whether errors up to ``rounding`` could change the decision, [B] bool."""
    better: Tensor
    """Whether this iterate is better than all before, [B] bool; all are where no record is kept."""


@dataclass
class BestRecord:
    """What is known of the best iterate so far of each image; :func:`judge` brings it up to date in place.

    An adversarial iterate is better than one that is not, and a larger loss decides among two of a kind. With early
    stopping the first adversarial iterate stays the best.
    """

    loss: Tensor
    """Loss of the best iterate, [B] float64; -inf before there is one."""
    succeeded: Tensor
    """Whether an iterate was adversarial, [B] bool."""
    unconfirmed: Tensor | None = None
    """Whether the best iterate is adversarial by these logits alone, [B] bool; None where they are the model's own."""
    doubtful: Tensor | None = None
    """Whether the decision at the best iterate is in doubt, [B] bool, or None."""
    early_stop: bool = True
    """Whether the first adversarial iterate stays the best."""


def judge(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B] int64
    *,
    targets: Tensor | None = None,  # [B] int64
    toward: Tensor | None = None,  # [B] int64
    loss: Loss = "dlr",
    rounding: float = 0.0,
    record: BestRecord | None = None,
) -> Judgement:
    """Loss, gradient and decision of each image, and whether it is its best iterate so far; in one pass over logits.

    With z the logits, y the labels and z_(1) >= z_(2) >= ... the sorted logits, the loss to be increased is

    - "ce": -log softmax(z)_y; as torch computes it on the CPU, bit for bit, so that attacks agree with other libraries;
    - "margin": max_{c != y} z_c - z_y;
    - "dlr": the margin over z_(1) - z_(3) (Croce and Hein 2020, equation 6); the margin below three classes.

    With ``targets`` t it is minus the loss of t, "dlr" being the margin. With ``toward`` c it is log softmax(z)_c,
    z_c - z_y, or that over z_(1) - (z_(3) + z_(4)) / 2 (equation 7; the difference below four classes). Of equal logits
    the lower class ranks first, in decisions and gradients. A logit of -inf is a class that the model excludes: it
    counts in no spread. Numbers are computed in float64 and rounded once, but for "ce".

    Args:
        logits: [B, C], float32 or float64, at least 2 classes; taken as a constant.
        labels: true classes, [B] int64.
        targets: classes to reach, [B] int64; only this decision is then adversarial.
        toward: wrong classes that the loss pulls to, [B] int64, any wrong decision being adversarial; not with targets.
        loss: "dlr", "margin" or "ce".
        rounding: the largest error of logits relative to the spread of an image's logits, >= 0, for ``doubtful``.
        record: the best iterates so far, brought up to date.

    Raises:
        ValueError: a shape or value is wrong; the message names the argument. Classes are not inspected (that would
            synchronise a GPU): the loss of one that does not exist is NaN.
        TypeError: a dtype or type is wrong; the message names the argument.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in (torch.float32, torch.float64):
        got = describe(logits) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a float32 or float64 tensor, got {got}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not rounding >= 0.0:
        raise ValueError(f"rounding must be at least 0, got {rounding}")
    if targets is not None and toward is not None:
        raise ValueError("give either targets or toward")
    labels = _rows(labels, logits, "labels", torch.int64).contiguous()
    targets, toward = (
        None if t is None else _rows(t, logits, name, torch.int64).contiguous()
        for name, t in (("targets", targets), ("toward", toward))
    )
    kept = Best() if record is None else _fields(record, logits)
    return Judgement(*_ops.judge(logits.detach().contiguous(), labels, targets, toward, loss, rounding, *kept))


def _fields(record: BestRecord, logits: Tensor) -> Best:
    if not isinstance(record, BestRecord):
        raise TypeError(f"record must be a BestRecord or None, got {type(record).__name__}")
    for name, t, dtype in (
        ("record.loss", record.loss, torch.float64),
        ("record.succeeded", record.succeeded, torch.bool),
        ("record.unconfirmed", record.unconfirmed, torch.bool),
        ("record.doubtful", record.doubtful, torch.bool),
    ):
        if t is not None and not _rows(t, logits, name, dtype).is_contiguous():
            raise ValueError(f"{name} must be contiguous, because it is changed in place")
    return Best(record.loss, record.succeeded, record.unconfirmed, record.doubtful, record.early_stop)


def _rows(t: Tensor, logits: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != dtype:
        got = describe(t) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a {str(dtype).removeprefix('torch.')} tensor, got {got}")
    if t.shape != logits.shape[:1] or t.device != logits.device:
        raise ValueError(f"{name} must have shape [{logits.shape[0]}] on {logits.device}, got {describe(t)}")
    return t
