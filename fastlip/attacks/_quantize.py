"""Images of few values, as files hold them: perturbations that survive being rounded to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip.attacks._arguments import count, shown
from fastlip.attacks._batch import Batch, per_sample
from fastlip.ops import Bounds, Norm, PerSample

#: The most bits of a value.
_MOST_BITS = 16
#: How far from a level, in levels, a number may lie by rounding.
_NEAR = 1e-2
#: Rounding error of a radius, relative to it: a level that lies further beyond the ball is outside.
_SLACK = 1e-6


@dataclass(frozen=True)
class Grid:
    """The values low + k (high - low) / steps for k = 0, ..., ``steps``."""

    low: float
    high: float
    steps: int

    def rounded(
        self,
        x: Tensor,  # [B, ...]
        x0: Tensor,  # [B, ...], on the grid
        *,
        eps: PerSample,
        norm: Norm,
        bounds: Bounds,
    ) -> Tensor:
        """A point of the grid near ``x``, like it within ``eps`` of ``x0`` in ``norm`` and within ``bounds``, [B, ...].

        In "linf" each element goes to its nearest level in the ball. In "l2" and "l1" nearest levels would lose most of
        a small perturbation or leave the ball: all elements go to the level towards ``x0``, and then, while the ball
        has room, to the one beyond, those that have come furthest first.
        """
        origin = self._levels(x0).round()
        moved = self._levels(x) - origin
        box = [_filled(b, x.dtype, x) for b in bounds]
        lo, hi = (self._levels(b) - origin for b in box)
        size, sign = moved.abs(), moved.sign()
        near = (size + _NEAR).floor()
        part = size - near
        radius = _filled(eps, torch.float64, x) * (self.steps / (self.high - self.low))
        radius = per_sample(radius.expand(len(x)), x)
        radius = radius * (1 + _SLACK)
        if norm == "linf":
            level = torch.minimum(near + (part >= 0.5), radius.floor())
        else:
            # Where the ball has no room for what is taken for rounding, nothing is.
            power = 2 if norm == "l2" else 1
            length = near.flatten(1).pow(power).sum(1)
            near = torch.where(per_sample(length > radius.flatten() ** power, x), size.floor(), near)
            level = near + self._beyond(near, size - near, radius, norm)
        level = torch.minimum(torch.maximum(sign * level, (lo - _NEAR).ceil()), (hi + _NEAR).floor())
        value = ((origin + level).to(x.dtype) / self.steps) * (self.high - self.low) + self.low
        return torch.where(level == 0, x0.to(x.dtype), torch.minimum(torch.maximum(value, box[0]), box[1]))

    def _beyond(self, near: Tensor, part: Tensor, radius: Tensor, norm: Norm) -> Tensor:
        """Which elements go one level further, [B, ...] bool: those of largest ``part`` that the ball has room for."""
        cost = 2 * near + 1 if norm == "l2" else torch.ones_like(near)
        power = 2 if norm == "l2" else 1
        room = radius.flatten(1) ** power - near.flatten(1).pow(power).sum(1, keepdim=True)
        order = part.flatten(1).argsort(dim=1, descending=True, stable=True)
        taken = cost.flatten(1).gather(1, order).cumsum(1) <= room
        taken &= part.flatten(1).gather(1, order) > _NEAR
        return torch.zeros_like(taken).scatter_(1, order, taken).view_as(near)

    def _levels(self, x: Tensor) -> Tensor:
        """``x`` in levels, float64."""
        return (x.double() - self.low) * (self.steps / (self.high - self.low))


def _filled(value: PerSample, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``value`` as a tensor on the device of ``like``; numbers are not copied there, which no CUDA graph could hold."""
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def grid_of(bits: object, inputs: Tensor, bounds: Bounds) -> Grid | None:
    """The grid of ``bits`` bits between ``bounds``, or between 0 and 1 where these are tensors; None for None.

    Raises:
        TypeError: ``bits`` is no integer, or ``inputs`` have 16 bits themselves.
        ValueError: ``bits`` is out of range, ``bounds`` are not finite, or ``inputs`` do not lie on the grid.
    """
    if bits is None:
        return None
    number = count(bits, "quantize", 1)
    if number > _MOST_BITS:
        raise ValueError(f"quantize must be at most {_MOST_BITS} bits, got {number}")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"quantize needs inputs in float32 or float64, got {shown(inputs)}")
    low, high = bounds
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = 0.0, 1.0
    if not -torch.inf < low < high < torch.inf:
        raise ValueError(f"quantize needs bounds that are finite and apart, got ({low:g}, {high:g})")
    grid = Grid(low, high, 2**number - 1)
    levels = grid._levels(inputs)
    if not bool(((levels - levels.round()).abs() <= _NEAR).all()):
        raise ValueError(f"quantize needs inputs that have {number} bits already: round them first")
    return grid


def rounded_images(grid: Grid, batch: Batch, x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """``x`` on the grid within each image's ball and box, [B, ...] in ``dtype``."""
    return grid.rounded(x.to(dtype), batch.x0.to(dtype), eps=batch.eps, norm=norm, bounds=batch.bounds)
