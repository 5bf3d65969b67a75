"""The images under attack and all that belongs to each of them, so that those that are adversarial can be dropped."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlip.ops import Bounds, PerSample


@dataclass(frozen=True)
class Batch:
    """Images under attack; ``rows`` are their positions in the caller's batch."""

    x0: Tensor  # [B, ...], float32 or float64
    labels: Tensor  # [B] int64
    targets: Tensor | None  # [B] int64
    eps: PerSample
    step_size: PerSample
    bounds: Bounds
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
        size = len(self)
        lo, hi = (take_bound(b, kept, size, self.x0.dim()) for b in self.bounds)
        return replace(
            self,
            x0=take(self.x0, kept),
            labels=self.labels[kept],
            targets=None if self.targets is None else self.targets[kept],
            toward=None if self.toward is None else self.toward[kept],
            eps=self.eps[kept] if isinstance(self.eps, Tensor) else self.eps,
            step_size=self.step_size[kept] if isinstance(self.step_size, Tensor) else self.step_size,
            bounds=(lo, hi),
            ids=self.ids[kept],
            rows=self.rows[kept],
        )

    def where(
        self,
        mask: Tensor,  # [B] bool
    ) -> "Batch":
        """The images at which ``mask`` is true."""
        kept = fewer(mask)
        return self if kept is None else self.take(kept)


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


def fewer(mask: Tensor) -> Tensor | None:
    """Positions of the true elements, [M] int64; None where all elements are true."""
    kept = rows_where(mask)
    return kept if len(kept) < len(mask) else None


def rows_where(mask: Tensor) -> Tensor:
    """Positions of the true elements, [M] int64."""
    return mask.nonzero().squeeze(1)
