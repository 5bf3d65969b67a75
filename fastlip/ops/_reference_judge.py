"""What an attack reads off logits, in plain PyTorch: in float64, rounded once; cross-entropy as torch computes it."""

import torch
from torch import Tensor
from torch.nn import functional

from fastlip.ops._schemas import Best, takes_fields


@takes_fields
def judge(
    logits: Tensor,  # [B, C], float32 or float64
    labels: Tensor,  # [B] int64
    targets: Tensor | None,  # [B] int64
    toward: Tensor | None,  # [B] int64
    loss: str,
    rounding: float,
    record: Best,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = logits.detach()
    own, known = _existing(labels if targets is None else targets, logits)
    if toward is not None:
        toward, also_known = _existing(toward, logits)
        known &= also_known
    known &= ~logits.isnan().any(1)
    away = targets is None and toward is None
    if loss == "ce":
        value, grad = _cross_entropy(logits, own if toward is None else toward, -1 if away else 1)
    else:
        value, grad = _margin(loss, logits.double(), own, toward, reach=targets is not None)
    value = torch.where(known, value, torch.nan).to(logits.dtype)
    grad = torch.where(known[:, None], grad, torch.nan).to(logits.dtype)

    z = logits.double()
    top, ranked = _ranked(z)
    adversarial = known & ((ranked[:, 0] != own) if targets is None else (ranked[:, 0] == own))
    least = z.masked_fill(z == -torch.inf, torch.inf).amin(1)
    doubtful = ~(top[:, 0] - top[:, 1] > 2 * rounding * (top[:, 0] - least))
    return value, grad, adversarial, doubtful, recorded(record, value.double(), adversarial, doubtful)


def recorded(record: Best, value: Tensor, adversarial: Tensor, doubtful: Tensor) -> Tensor:
    """Which iterates are better than the best so far, [B] bool, once the record says so too; NaN is the least loss."""
    if record.best_loss is None or record.succeeded is None:
        return torch.ones_like(adversarial)
    value = value.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    larger, succeeded = value > record.best_loss, record.succeeded
    if record.early_stop:
        better = ~succeeded & (adversarial | larger)
    else:
        better = (adversarial & ~succeeded) | ((adversarial == succeeded) & larger)
    record.best_loss.copy_(torch.where(better, value, record.best_loss))
    if record.unconfirmed is not None:
        record.unconfirmed.copy_(torch.where(better, adversarial, record.unconfirmed))
    if record.best_doubtful is not None:
        record.best_doubtful.copy_(torch.where(better, doubtful, record.best_doubtful))
    record.succeeded.logical_or_(adversarial)
    return better


def _existing(classes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``classes``, or the nearest that the model has; and whether it has them itself."""
    nearest = classes.clamp(0, logits.shape[1] - 1)
    return nearest, nearest == classes


def _ranked(z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and their classes from the largest down; of equal ones the lower class comes first."""
    ranked = z.sort(dim=1, descending=True, stable=True)
    return ranked.values, ranked.indices


def _one_hot(classes: Tensor, z: Tensor) -> Tensor:
    return functional.one_hot(classes, z.shape[1]).to(z.dtype)


def _at(z: Tensor, classes: Tensor) -> Tensor:
    return z.gather(1, classes[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, classes: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """``sign`` times log softmax at ``classes`` [B], and its gradient [B, C]; bit for bit as torch's cross-entropy."""
    log_p = logits.log_softmax(1)
    grad = torch.ops.aten._log_softmax_backward_data(sign * _one_hot(classes, logits), log_p, 1, logits.dtype)
    return sign * _at(log_p, classes), grad


def _margin(
    name: str,
    z: Tensor,  # [B, C] float64
    own: Tensor,  # [B]
    toward: Tensor | None,  # [B]
    *,
    reach: bool,
) -> tuple[Tensor, Tensor]:
    """The margin or DLR [B] that increases as the decision leaves ``own``, or reaches it, and its gradient [B, C]."""
    if toward is not None:
        return _over_spread(name, z, toward, own, 4)
    other = _ranked(z.scatter(1, own[:, None], -torch.inf))[1]
    # -inf sorts as the others do: the class itself may come first where no other is left.
    other = torch.where(other[:, 0] == own, other[:, 1], other[:, 0])
    if reach:  # DLR would also increase by widening the spread of logits while the target stays far from the top
        return _over_spread("margin", z, own, other, 3)
    return _over_spread(name, z, other, own, 3)


def _over_spread(name: str, z: Tensor, other: Tensor, own: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """The margin of ``other`` over ``own``, for DLR over the spread of the ``least`` largest logits.

    A logit of -inf is a class that the model excludes. Where fewer than ``least`` are left, or the spread is 0, DLR is
    the margin.
    """
    margin, pull = _at(z, other) - _at(z, own), _one_hot(other, z) - _one_hot(own, z)
    if name == "margin" or z.shape[1] < least:
        return margin, pull
    top, at = _ranked(z)
    spread = top[:, 0] - (top[:, 2] if least == 3 else (top[:, 2] + top[:, 3]) / 2)
    widening = _one_hot(at[:, 0], z)
    for i in range(2, least):
        widening = widening - _one_hot(at[:, i], z) / (least - 2)
    use = (top[:, least - 1] > -torch.inf) & (spread > 0)
    spread = torch.where(use, spread, 1)
    value = margin / spread
    grad = (pull - torch.where(use, value, 0)[:, None] * widening) / spread[:, None]
    return value, grad
