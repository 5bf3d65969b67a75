"""The images of a call and all that goes with each of them, so that those which fell can be left behind."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlip.attacks._arguments import check_images, check_inside, check_vector, checked_bounds
from fastlip.ops import Bounds, PerSample


@dataclass(frozen=True)
class Batch:
    """Images under attack; ``rows`` are their places in the caller's batch."""

    x0: Tensor  # [B, ...], float32 or float64
    labels: Tensor  # [B] int64
    targets: Tensor | None  # [B] int64
    eps: PerSample
    step_size: PerSample
    bounds: Bounds
    ids: Tensor  # [B] int64
    rows: Tensor  # [B] int64
    toward: Tensor | None = None  # [B] int64, a wrong class that the loss pulls to; success is any wrong decision

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
            eps=_take_value(self.eps, kept),
            step_size=_take_value(self.step_size, kept),
            bounds=(lo, hi),
            ids=self.ids[kept],
            rows=self.rows[kept],
        )


def take(
    t: Tensor,  # [B, ...]
    kept: Tensor,  # [K] int64
) -> Tensor:
    """Samples ``kept`` of ``t`` in its memory format: [K, ...]."""
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    out = t[kept]
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def _take_value(value: PerSample, kept: Tensor) -> PerSample:
    return value[kept] if isinstance(value, Tensor) else value


def take_bound(bound: PerSample, kept: Tensor | slice, size: int, dims: int) -> PerSample:
    """The bound of the images at positions ``kept``: a float, one tensor for all images, or one for each."""
    return bound[kept] if isinstance(bound, Tensor) and differs_between_images(bound, size, dims) else bound


def differs_between_images(bound: Tensor, size: int, dims: int) -> bool:
    """Whether a bound of ``size`` inputs with ``dims`` axes has a row for each of them."""
    return bound.dim() == dims and bound.shape[0] == size and size > 1


def new_batch(
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    targets: Tensor | None,  # [B] int64
    *,
    eps: PerSample,
    step_size: PerSample,
    bounds: Bounds,
    ids: Tensor | None,  # [B] int64
) -> Batch:
    """The images of a call, widened to float32 at least, with labels, targets and ids that are checked here.

    ``inputs`` and ``bounds`` have been (:func:`within`), and so have ``eps`` and ``step_size``.
    """
    size = inputs.shape[0]
    for name, classes in (("labels", labels), ("targets", targets)):
        if name == "labels" or classes is not None:
            check_vector(classes, name, inputs, torch.int64)
    if ids is not None:
        check_vector(ids, "ids", inputs, torch.int64)
    return Batch(
        # Copies: a tensor made under inference_mode cannot take part in autograd.
        x0=inputs.detach().to(wide_dtype(inputs), copy=True),
        labels=labels.clone(),
        targets=None if targets is None else targets.clone(),
        eps=eps,
        step_size=step_size,
        bounds=bounds,
        ids=torch.arange(size, device=inputs.device) if ids is None else ids,
        rows=torch.arange(size, device=inputs.device),
    )


def wide_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype in which iterates are kept."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def within(
    inputs: Tensor,  # [B, ...]
    bounds: Bounds,
) -> Bounds:
    """The bounds as floats or tensors; raise where ``inputs`` are not images within them."""
    check_images(inputs)
    bounds = checked_bounds(bounds, inputs)
    check_inside(inputs, bounds)
    return bounds


def rows_of(
    active: Tensor | None,  # [B] bool
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """Positions of the images to be attacked, [K] int64."""
    if active is None:
        return torch.arange(inputs.shape[0], device=inputs.device)
    check_vector(active, "active", inputs, torch.bool)
    return active.nonzero().squeeze(1)


def check_classes(
    logits: Tensor,  # [B, C]
    **classes: Tensor | None,  # [B] int64
) -> None:
    """Raise where a label is no class of the model."""
    for name, wanted in classes.items():
        if wanted is not None and bool(((wanted < 0) | (wanted >= logits.shape[1])).any()):
            raise ValueError(f"{name} must lie in [0, {logits.shape[1]}), the model's classes")
