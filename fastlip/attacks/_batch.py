"""The images under attack, their iterates, and all that belongs to each of them: a row for each image."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlip import ops
from fastlip.ops import Bounds, PerSample

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Batch:
    """Images under attack; ``rows`` are their positions in the caller's batch."""

    x0: Tensor  # [B, ...], float32 or float64
    labels: Tensor  # [B] int64
    targets: Tensor | None  # [B] int64
    eps: PerSample
    step_size: PerSample
    bounds: Bounds  # both floats, or both tensors [B or 1, ...]
    ids: Tensor  # [B] int64
    rows: Tensor  # [B] int64
    toward: Tensor | None = None  # [B] int64, a wrong class that the loss pulls to; any wrong decision is a success

    def __len__(self) -> int:
        return self.x0.shape[0]

    def take(
        self,
        kept: Tensor,  # [K] int64
    ) -> "Batch":
        """The images at positions ``kept``."""
        return map_rows(self, lambda t: take(t, kept), len(self))

    def where(
        self,
        mask: Tensor,  # [B] bool
    ) -> "Batch":
        """The images at which ``mask`` is true."""
        kept = fewer(mask)
        return self if kept is None else self.take(kept)


@dataclass
class Iterates:
    """The iterates of a run, with all tensors that an iteration reads and changes."""

    batch: Batch
    x: Tensor  # [B, ...] like x0
    not_finite: Tensor  # [B] bool, whether an element of a gradient was not finite; the steps take it for 0
    best: Tensor | None = None  # [B, ...] like x, the best iterates before this one; None where only the last counts
    record: ops.BestRecord | None = None  # of the best iterates, this one included once it has been judged
    state: ops.APGDState | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def keep(
        self,
        kept: Tensor,  # [K] int64
    ) -> None:
        """Go on with the images at positions ``kept``, one tensor after another: the memory of each serves the next."""
        size = len(self)
        for part in (self.record, self.state, self):
            for name in _in_rows(part):
                if name not in ("record", "state"):
                    setattr(part, name, map_rows(getattr(part, name), lambda t: take(t, kept), size))


def new_batch(
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    targets: Tensor | None,  # [B] int64
    *,
    eps: PerSample,
    step_size: PerSample,
    bounds: Bounds,
    ids: Tensor | None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
) -> Batch:
    """The images of a call that are ``active``, widened to float32 at least; all arguments have been checked."""
    rows = torch.arange(inputs.shape[0], device=inputs.device)
    if any(isinstance(b, Tensor) for b in bounds):
        lo, hi = (torch.as_tensor(b, device=inputs.device) for b in bounds)
        bounds = lo[(None,) * (inputs.dim() - lo.dim())], hi[(None,) * (inputs.dim() - hi.dim())]
    batch = Batch(
        # Copies, because a tensor made under inference_mode cannot take part in autograd.
        x0=inputs.detach().to(wide_dtype(inputs), copy=True),
        labels=labels.clone(),
        targets=None if targets is None else targets.clone(),
        eps=eps,
        step_size=step_size,
        bounds=bounds,
        ids=rows if ids is None else ids,
        rows=rows,
    )
    return batch if active is None else batch.where(active)


def wide_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype in which iterates are kept."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def map_rows(value: Rows, change: Callable[[Tensor], Tensor], size: int) -> Rows:
    """``value`` with ``change`` made to all its tensors that have ``size`` rows, one for each image."""

    def changed(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part) if part.shape[0] == size else part
        if isinstance(part, tuple):
            return tuple(map(changed, part))
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{name: changed(getattr(part, name)) for name in _in_rows(part)})
        return part

    out: Rows = changed(value)
    return out


def _in_rows(part: Any) -> list[str]:
    """The fields of a dataclass that may have rows; of what is none, none. APGD's schedule has a row for each step."""
    return [f.name for f in fields(part) if f.name != "schedule"] if is_dataclass(part) else []


def take(
    t: Tensor,  # [B, ...]
    kept: Tensor,  # [K] int64
) -> Tensor:
    """Samples ``kept`` of ``t`` in its memory format: [K, ...]."""
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    out = t[kept]
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def take_bound(bound: PerSample, kept: Tensor | slice, size: int, dims: int) -> PerSample:
    """The bound of the images at positions ``kept``: a float, one tensor for all images, or one for each."""
    return bound[kept] if isinstance(bound, Tensor) and differs_between_images(bound, size, dims) else bound


def differs_between_images(bound: Tensor, size: int, dims: int) -> bool:
    """Whether a bound of ``size`` inputs with ``dims`` axes has a row for each of them."""
    return bound.dim() == dims and bound.shape[0] == size and size > 1


def per_sample(
    values: Tensor,  # [B]
    like: Tensor,  # [B, ...]
) -> Tensor:
    """One value for each sample as [B, 1, ...], which broadcasts to ``like``."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def put_rows_(
    target: Tensor,  # [B, ...], changed
    source: Tensor,  # [B, ...]
    mask: Tensor,  # [B] bool
) -> None:
    """Make those samples of ``target`` at which ``mask`` is true those of ``source``; few of them cost little."""
    if target.device.type != "cpu":  # where to count them is to wait
        target.copy_(torch.where(per_sample(mask, target), source, target))
    elif len(rows := rows_where(mask)) > 0:
        target[rows] = source[rows]


def fewer(mask: Tensor) -> Tensor | None:
    """Positions of the true elements, [M] int64; None where all elements are true."""
    kept = rows_where(mask)
    return kept if len(kept) < len(mask) else None


def rows_where(mask: Tensor) -> Tensor:
    """Positions of the true elements, [M] int64."""
    return mask.nonzero().squeeze(1)
