"""What an attack reads off logits in one pass: loss, gradient, decision, and which iterates are the best so far."""

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastlip.ops._bindings import checked_by_bindings, raise_unless_refused
from fastlip.ops._checks import begin_together, describe
from fastlip.ops._reference_judge import recorded
from fastlip.ops._schemas import Best

_judge = torch.ops.fastlip.judge

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

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> record = ops.BestRecord(torch.full((4,), -torch.inf, dtype=torch.float64), torch.zeros(4, dtype=torch.bool))
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> for _ in range(2):
        ...     print(ops.judge(torch.randn(4, 10), labels, record=record).better)
    """

    loss: Tensor
    """Loss of the best iterate, [B] float64; -inf before there is one, and where it is NaN."""
    succeeded: Tensor
    """Whether an iterate was adversarial, [B] bool."""
    unconfirmed: Tensor | None = None
    """Whether the best iterate is adversarial by these logits alone, [B] bool; None where they are the model's own."""
    doubtful: Tensor | None = None
    """Whether the decision at the best iterate is in doubt, [B] bool, or None."""
    early_stop: bool = True
    """Whether the first adversarial iterate stays the best."""

    def update(
        self,
        loss: Tensor,  # [B] float64
        adversarial: Tensor,  # [B] bool
        doubtful: Tensor,  # [B] bool
    ) -> Tensor:
        """Take over iterates of another loss than :func:`judge` knows; which are better than before, [B] bool."""
        return recorded(Best(*_fields(self)), loss, adversarial, doubtful)


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

    - "ce": -log softmax(z)_y; on the CPU as torch computes it, bit for bit, so that attacks agree with other libraries;
    - "margin": max_{c != y} z_c - z_y;
    - "dlr": the margin over z_(1) - z_(3) (Croce and Hein 2020, equation 6); the margin below three classes.

    With ``targets`` t it is minus the loss of t, "dlr" being the margin. With ``toward`` c it is log softmax(z)_c,
    z_c - z_y, or that over z_(1) - (z_(3) + z_(4)) / 2 (equation 7; the difference below four classes). Of equal logits
    the lower class ranks first, in decisions and gradients. A logit of -inf is a class that the model excludes: it
    counts in no spread. Numbers are computed in float64 and rounded once, but for "ce" on the CPU.

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

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> logits, labels = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
        >>> judged = ops.judge(logits, labels, loss="margin")
        >>> print(judged.loss, judged.adversarial)
    """
    if (
        checked_by_bindings(logits)
        and not torch.compiler.is_compiling()
        and logits.is_contiguous()
        and (record is None or (type(record) is BestRecord and record.loss is not None))
    ):
        try:
            return Judgement._make(_judge(logits, labels, targets, toward, loss, rounding, *_fields(record)))
        except RuntimeError as error:  # the checks below say what was wrong with it
            raise_unless_refused(error)
    if not isinstance(logits, Tensor) or logits.dtype not in (torch.float32, torch.float64):
        got = describe(logits) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a float32 or float64 tensor, got {got}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if isinstance(rounding, bool) or not isinstance(rounding, (int, float)):
        raise TypeError(f"rounding must be a float, got {type(rounding).__name__}")
    if not rounding >= 0.0:
        raise ValueError(f"rounding must be at least 0, got {rounding}")
    if targets is not None and toward is not None:
        raise ValueError("give either targets or toward")
    labels = _rows(labels, logits, "labels", torch.int64).contiguous()
    targets, toward = (
        None if t is None else _rows(t, logits, name, torch.int64).contiguous()
        for name, t in (("targets", targets), ("toward", toward))
    )
    if record is not None:
        _check_record(record, logits)
    return Judgement._make(_judge(logits.contiguous(), labels, targets, toward, loss, rounding, *_fields(record)))


def _fields(record: BestRecord | None) -> tuple:
    """The fields of ``fastlip.ops._schemas.Best``."""
    if record is None:
        return ()
    return record.loss, record.succeeded, record.unconfirmed, record.doubtful, record.early_stop


def _check_record(record: BestRecord, logits: Tensor) -> None:
    if not isinstance(record, BestRecord):
        raise TypeError(f"record must be a BestRecord or None, got {type(record).__name__}")
    _rows(record.loss, logits, "record.loss", torch.float64)
    _rows(record.succeeded, logits, "record.succeeded", torch.bool)
    flags = {"succeeded": record.succeeded}
    for name, t in (("unconfirmed", record.unconfirmed), ("doubtful", record.doubtful)):
        if t is not None:
            flags[name] = _rows(t, logits, f"record.{name}", torch.bool)
    for name, t in {"loss": record.loss, **flags}.items():
        if not t.is_contiguous():
            raise ValueError(f"record.{name} must be contiguous, because it is changed in place")
    if not torch.compiler.is_compiling() and logits.numel():
        for (name, t), (other, u) in itertools.combinations(flags.items(), 2):
            if begin_together(t, u):
                raise ValueError(f"record.{other} must not share its memory with record.{name}")


def _rows(t: Tensor, logits: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != dtype:
        got = describe(t) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a tensor of {str(dtype).removeprefix('torch.')}, got {got}")
    if t.shape != logits.shape[:1] or t.device != logits.device:
        raise ValueError(f"{name} must have shape [{logits.shape[0]}] on {logits.device}, got {describe(t)}")
    return t
