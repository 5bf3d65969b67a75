"""The images of a call and all that goes with each of them, so that those which fell can be left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
        lo, hi = (_take_bound(b, kept, size, self.x0.dim()) for b in self.bounds)
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


def _take_bound(bound: PerSample, kept: Tensor, size: int, dims: int) -> PerSample:
    """A bound may be a float, one tensor for all images, or one for each."""
    if isinstance(bound, Tensor) and bound.dim() == dims and bound.shape[0] == size and size > 1:
        return bound[kept]
    return bound


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
    """Check what every attack is given and widen the images to float32 at least."""
    check_inputs(inputs, bounds)
    size = inputs.shape[0]
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None:
            check_vector(classes, name, inputs, torch.int64)
    if ids is not None:
        check_vector(ids, "ids", inputs, torch.int64)
    check_radius(eps, "eps", inputs)
    if isinstance(step_size, Tensor):
        check_vector(step_size, "step_size", inputs)
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return Batch(
        # Copies: a tensor made under inference_mode cannot take part in autograd.
        x0=inputs.detach().to(wide, copy=True),
        labels=labels.clone(),
        targets=None if targets is None else targets.clone(),
        eps=eps,
        step_size=step_size,
        bounds=bounds,
        ids=torch.arange(size, device=inputs.device) if ids is None else ids,
        rows=torch.arange(size, device=inputs.device),
    )


def rows_of(
    active: Tensor | None,  # [B] bool
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """Positions of the images to be attacked, [K] int64."""
    if active is None:
        return torch.arange(inputs.shape[0], device=inputs.device)
    check_vector(active, "active", inputs, torch.bool)
    return active.nonzero().squeeze(1)


def check_inputs(
    inputs: Tensor,  # [B, ...]
    bounds: Bounds,
) -> None:
    """Raise where ``inputs`` are not images within ``bounds``."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {got}")
    if inputs.dim() == 0:
        raise ValueError("inputs must have a batch dimension, got a scalar")
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError("bounds must be a pair (lower, upper)")
    lo, hi = bounds
    if not bool(((inputs >= lo) & (inputs <= hi)).all()):
        if bool(inputs.isnan().any()):
            raise ValueError("inputs hold NaN")
        least, most = inputs.min().item(), inputs.max().item()
        raise ValueError(
            f"inputs must lie within bounds, but hold values from {least:g} to {most:g}: "
            "scale them, or pass the bounds they have (normalisation belongs into the model)"
        )


def check_vector(t: Tensor, name: str, inputs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise where ``t`` is not one value of ``dtype`` for each of ``inputs``."""
    if not isinstance(t, Tensor) or t.dtype != (dtype or t.dtype):
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a {dtype} tensor, got {got}")
    if t.shape != inputs.shape[:1] or t.device != inputs.device:
        raise ValueError(
            f"{name} must have shape [{inputs.shape[0]}] on {inputs.device}, got {list(t.shape)} on {t.device}"
        )


def check_radius(value: PerSample, name: str, inputs: Tensor) -> None:
    """Raise where ``value`` is no radius, nor one for each of ``inputs``."""
    if isinstance(value, Tensor):
        check_vector(value, name, inputs)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a [B] tensor, got {type(value).__name__}")
    if not (bool((value >= 0).all()) if isinstance(value, Tensor) else value >= 0):
        raise ValueError(f"{name} must be at least 0, got {value.min().item() if isinstance(value, Tensor) else value}")


def check_classes(
    logits: Tensor,  # [B, C]
    **classes: Tensor | None,  # [B] int64
) -> None:
    """Raise where a label is no class of the model."""
    for name, wanted in classes.items():
        if wanted is not None and bool(((wanted < 0) | (wanted >= logits.shape[1])).any()):
            raise ValueError(f"{name} must lie in [0, {logits.shape[1]}), the model's classes")
