"""The set of inputs on which a bound holds: all of them, a box, or the part of a box within an L2 ball."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlip.lipschitz._intervals import Interval, up, upper_norm

#: Share of a ball's radius within which points are drawn, so that rounding does not move them out of it.
_INSIDE = 1.0 - 1e-6


@dataclass(frozen=True, eq=False)
class Domain:
    """A convex set of inputs.

    Attributes:
        lower: least value of each element, [*shape] float64; -inf where there is none.
        upper: largest value of each element, [*shape] float64; inf where there is none.
        centre: a point of the box, or the ball's centre, [*shape] float64.
        reach: upper bound on the L2 distance of a point of the set from the centre; inf if there is none.
        radius: radius of the ball; None without one.
    """

    lower: Tensor
    upper: Tensor
    centre: Tensor
    reach: float
    radius: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether the set has a largest distance."""
        return math.isfinite(self.reach)

    @property
    def restricted(self) -> bool:
        """Whether the set leaves anything out."""
        return self.radius is not None or bool((self.lower.isfinite() | self.upper.isfinite()).any())

    def interval(self, device: torch.device) -> Interval:
        """Bounds of the set in the first row, and its centre alone in the second, [2, *shape]."""
        centre = self.centre.to(device)
        inside = Interval(self.lower.to(device)[None], self.upper.to(device)[None])
        if self.radius is not None:
            inside = inside.intersection(Interval.l2_ball(centre[None], self.radius))
        point = Interval(centre[None], centre[None])
        return stacked([inside, point])

    def sample(
        self,
        x: Tensor,  # [count, *shape]
        seed: int,
    ) -> Tensor:
        """Points of the set, half of them at its edge, as many as there are in x; x itself if nothing is left out."""
        if not self.restricted:
            return x
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(len(x)).view(-1, *(1,) * (x.dim() - 1))
        lower, upper = self.lower.cpu(), self.upper.cpu()
        share = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        share = torch.where(rows % 2 == 1, share.round(), share)
        drawn = torch.where((upper - lower).isfinite(), lower + share * (upper - lower), x.cpu().double())
        if self.radius is not None:
            direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            direction /= torch.linalg.vector_norm(direction.flatten(1), dim=1).view(rows.shape).clamp_min(1e-300)
            length = torch.where(rows % 2 == 1, 1.0, share.flatten(1)[:, :1].reshape(rows.shape))
            drawn = self.centre.cpu() + self.radius * _INSIDE * length * direction
        return self.project(drawn.to(x))

    def project(self, x: Tensor) -> Tensor:
        """Points of the set near those of x, [count, *shape], in x's dtype."""
        if not self.restricted:
            return x
        wide = x.double()
        if self.radius is not None:
            centre = self.centre.to(wide)
            away = wide - centre
            length = torch.linalg.vector_norm(away.flatten(1), dim=1).view(-1, *(1,) * (x.dim() - 1))
            wide = centre + away * (self.radius * _INSIDE / length.clamp_min(1e-300)).clamp_max(1.0)
        # The centre lies in the box, so that clipping does not lead out of the ball.
        return torch.minimum(torch.maximum(wide, self.lower.to(wide)), self.upper.to(wide)).to(x)

    def to_dict(self) -> dict[str, Any]:
        """The kind of set, the extremes of its bounds and its radius, as plain Python values."""
        kind = "everywhere" if not self.restricted else "box" if self.radius is None else "ball"
        result: dict[str, Any] = {"kind": kind}
        if bool((self.lower.isfinite() | self.upper.isfinite()).any()):
            result |= {"lower": self.lower.min().item(), "upper": self.upper.max().item()}
        return result if self.radius is None else result | {"radius": self.radius}

    def to_state(self) -> dict[str, Any]:
        """The whole set as plain Python values: a number for a tensor of equal elements, else its elements in order."""

        def numbers(t: Tensor) -> float | list[float]:
            elements: list[float] = t.flatten().tolist()
            return elements[0] if len(set(elements)) == 1 else elements

        return {
            "shape": list(self.centre.shape),
            "lower": numbers(self.lower),
            "upper": numbers(self.upper),
            "centre": numbers(self.centre),
            "reach": self.reach,
            "radius": self.radius,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Domain":
        """The set that :meth:`to_state` gave."""
        shape = state["shape"]

        def tensor(name: str) -> Tensor:
            values = torch.tensor(state[name], dtype=torch.float64)
            return (values if values.dim() == 0 else values.reshape(shape)).expand(shape).clone()

        return cls(tensor("lower"), tensor("upper"), tensor("centre"), state["reach"], state["radius"])

    def __str__(self) -> str:
        if not self.restricted:
            return "everywhere"
        box = f"within [{self.lower.min().item():g}, {self.upper.max().item():g}]"
        if self.radius is None:
            return box
        ball = f"within an L2 distance of {self.radius:g} from one input"
        return ball if self.to_dict().keys().isdisjoint(("lower",)) else f"{box}, and {ball}"


def domain_of(
    shape: Sequence[int],
    bounds: tuple[float | Tensor, float | Tensor] | None,
    around: Tensor | None,
    radius: float | None,
) -> Domain:
    """The set of inputs that the arguments of :func:`fastlip.lipschitz.lipschitz_bound` describe.

    Raises:
        ValueError: the arguments do not describe a set of inputs of this shape.
    """
    if (around is None) != (radius is None):
        raise ValueError("around and radius describe a ball together: give both or neither")
    lower, upper = _box(shape, bounds)
    if around is None or radius is None:
        centre = 0.5 * lower + 0.5 * upper
        centre = torch.where(centre.isfinite(), centre, centre.nan_to_num(0.0, 0.0, 0.0).clamp(lower, upper))
        far = up(torch.maximum(upper - centre, centre - lower))
        return Domain(lower, upper, centre, upper_norm(far[None]).item())
    if not isinstance(around, Tensor) or tuple(around.shape) not in (tuple(shape), (1, *shape)):
        got = list(around.shape) if isinstance(around, Tensor) else type(around).__name__
        raise ValueError(f"around must be one input, a tensor of shape {list(shape)}, got {got}")
    centre = around.detach().cpu().double().reshape(*shape)
    if not bool(centre.isfinite().all()) or not bool(((lower <= centre) & (centre <= upper)).all()):
        raise ValueError("around must be finite, and within bounds")
    if isinstance(radius, bool) or not 0.0 <= float(radius) < math.inf:
        raise ValueError(f"radius must be a finite number >= 0, got {radius!r}")
    return Domain(lower, upper, centre, float(radius), float(radius))


def _box(shape: Sequence[int], bounds: tuple[float | Tensor, float | Tensor] | None) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of a box, [*shape] float64 each."""
    if bounds is None:
        bounds = (-math.inf, math.inf)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"bounds must be a pair (lower, upper), got {bounds!r}")
    ends = [torch.as_tensor(end, dtype=torch.float64).detach().cpu() for end in bounds]
    # One number per channel, the first axis.
    ends = [end.view(-1, *(1,) * (len(shape) - 1)) if end.dim() == 1 and len(end) == shape[0] else end for end in ends]
    box = Interval.box(ends[0], ends[1], shape)
    return box.lower[0], box.upper[0]


def stacked(rows: Sequence[Interval]) -> Interval:
    """The domains of several intervals as one batch."""
    ends = (torch.cat([getattr(row, name) for row in rows]) for name in ("lower", "upper", "norm"))
    return Interval.as_stored(*ends)


def row(interval: Interval, index: int) -> Interval:
    """One domain of a batch, as a batch of one."""
    at = slice(index, index + 1)
    return Interval.as_stored(interval.lower[at], interval.upper[at], interval.norm[at])
