"""Bounds of a tensor's values over domains of the model's input: elementwise, and of the norm of one sample.

Every bound is rounded outwards. Where nothing is known it is infinite, never NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
#: Smallest normal number: an upper bound on what underflow changes, denormals flushed to 0 included.
TINY = torch.finfo(torch.float64).tiny
INF = float("inf")
#: Largest elements between which the squares of a tensor's elements can be added up as they are.
_LEAST, _MOST = 1e-100, 1e100


class Interval:
    """Bounds of one sample's tensor over each of B domains (B = 1 for a box that all samples share).

    Attributes:
        lower: elementwise lower bounds, [B, *shape] float64; -inf where nothing is known.
        upper: elementwise upper bounds, [B, *shape] float64; inf where nothing is known.
        norm: upper bounds on the L2 norm of the sample, [B] float64; inf where nothing is known.
    """

    __slots__ = ("lower", "norm", "upper")

    def __init__(self, lower: Tensor, upper: Tensor, norm: Tensor | None = None) -> None:
        """Sharpen the elements by the norm and the norm by the elements; NaN stands for nothing known.

        Args:
            lower: [B, *shape], or [1, *shape] where ``upper`` has B.
            upper: likewise.
            norm: [B] or [1], if more is known than the elements say.

        Raises:
            ValueError: a lower bound is above the upper one.
        """
        lower, upper = torch.broadcast_tensors(lower.detach().double(), upper.detach().double())
        ordered = bool((lower <= upper).all())
        if not ordered:  # or one of them is NaN
            lower = torch.where(lower.isnan(), -INF, lower)
            upper = torch.where(upper.isnan(), INF, upper)
        if norm is not None:
            norm = norm.detach().double()
            norm = torch.where(norm.isnan(), INF, norm)
            if bool((norm < INF).any()):
                row = norm.view(-1, *(1,) * (lower.dim() - 1))
                lower, upper, ordered = torch.maximum(lower, -row), torch.minimum(upper, row), False
        if not ordered and not bool((lower <= upper).all()):
            raise ValueError("empty interval: a lower bound is above the upper one")
        own = upper_norm(torch.maximum(-lower, upper))
        self.lower, self.upper = lower, upper
        self.norm = own if norm is None else torch.minimum(own, norm)

    @classmethod
    def as_stored(cls, lower: Tensor, upper: Tensor, norm: Tensor) -> "Interval":
        """Domains of intervals that there are already, with nothing to sharpen."""
        new = object.__new__(cls)
        new.lower, new.upper, new.norm = lower, upper, norm
        return new

    @classmethod
    def unbounded(cls, shape: Sequence[int], batch: int = 1, device: torch.device | str | None = None) -> "Interval":
        """Nothing known of a tensor with this shape of one sample, on ``batch`` domains."""
        top = torch.full((batch, *shape), INF, dtype=torch.float64, device=device)
        return cls(-top, top)

    @classmethod
    def box(cls, lower: float | Tensor, upper: float | Tensor, shape: Sequence[int]) -> "Interval":
        """One box, of numbers or of tensors that broadcast to ``shape``, which is that of one sample.

        Raises:
            ValueError: a bound is NaN, does not broadcast, or a lower one is above the upper one.
        """
        ends = [torch.as_tensor(end, dtype=torch.float64) for end in (lower, upper)]
        if any(bool(end.isnan().any()) for end in ends):
            raise ValueError("bounds must not be NaN")
        try:
            low, high = (end.expand(*shape)[None] for end in ends)
        except RuntimeError:
            raise ValueError(
                f"bounds of shapes {list(ends[0].shape)} and {list(ends[1].shape)} do not broadcast to {list(shape)}"
            ) from None
        if bool((low > high).any()):
            raise ValueError("bounds must be (lower, upper) with lower <= upper")
        return cls(low, high)

    @classmethod
    def l2_ball(cls, x: Tensor, radius: float | Tensor) -> "Interval":
        """Balls around the samples of x, [B, *shape], of one L2 radius or of one for each, [B]."""
        return cls(x, x).widened(radius)

    @classmethod
    def linf_ball(cls, x: Tensor, radius: float | Tensor) -> "Interval":
        """The same for the Linf norm: cubes."""
        x = x.detach().double()
        row = _rows(radius, x)
        return cls(down(x - row), up(x + row))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.lower.shape[1:])

    def rows(self, domains: slice) -> "Interval":
        """Some of the domains."""
        return Interval.as_stored(self.lower[domains], self.upper[domains], self.norm[domains])

    @property
    def batch(self) -> int:
        """Number of domains."""
        return len(self.lower)

    def magnitude(self) -> Tensor:
        """Largest magnitude of each element, [B, *shape]."""
        return torch.maximum(-self.lower, self.upper)

    def centre_and_radius(self) -> tuple[Tensor, Tensor]:
        """A centre and the largest distance of the elements from it, [B, *shape] each; 0 and inf where unbounded."""
        centre = 0.5 * self.lower + 0.5 * self.upper
        centre = torch.where(centre.isfinite(), centre, 0.0)
        radius = torch.maximum(centre - self.lower, self.upper - centre)
        return centre, torch.where(radius > 0.0, up(radius), radius)

    def widened(self, radius: float | Tensor) -> "Interval":
        """Bounds of all tensors within an L2 distance of these, one distance or one for each domain, [B]."""
        row = _rows(radius, self.lower)
        norm = up(self.norm + row.flatten())
        return Interval(down(self.lower - row), up(self.upper + row), norm)

    def hull(self, other: "Interval") -> "Interval":
        """Bounds of what lies in either."""
        lower, upper = torch.minimum(self.lower, other.lower), torch.maximum(self.upper, other.upper)
        return Interval(lower, upper, torch.maximum(self.norm, other.norm))

    def intersection(self, other: "Interval") -> "Interval":
        """Bounds of what lies in both.

        Raises:
            ValueError: nothing does.
        """
        lower, upper = torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper)
        return Interval(lower, upper, torch.minimum(self.norm, other.norm))


def as_rows(t: Tensor) -> Tensor:
    """Samples as rows, [B, *shape] to [B, n]; the shape of one may be empty."""
    return t.flatten(1) if t.dim() > 1 else t[:, None]


def up(t: Tensor) -> Tensor:
    """The next number above each element, so that one correctly rounded operation before it is covered."""
    return torch.nextafter(t, torch.full_like(t, INF))


def down(t: Tensor) -> Tensor:
    """The next number below each element."""
    return torch.nextafter(t, torch.full_like(t, -INF))


def upper_norm(magnitude: Tensor) -> Tensor:
    """Upper bounds on the L2 norms of samples from the magnitudes of their elements, [B, *shape] to [B]."""
    flat = as_rows(magnitude)
    if not flat.shape[1]:
        return flat.new_zeros(len(flat))
    largest = flat.amax(1)
    usable = (largest > 0.0) & largest.isfinite()
    if bool(((largest > _LEAST) & (largest < _MOST) | ~usable).all()):
        scale, relative = torch.ones_like(largest), torch.linalg.vector_norm(flat, dim=1)
    else:  # squares may leave the range of float64, unless the largest element is about 1
        scale = torch.where(usable, largest, 1.0)
        relative = torch.linalg.vector_norm(flat / scale[:, None], dim=1)
    norm = relative * scale * (1.0 + EPS * (flat.shape[1] + 8)) + TINY
    return torch.where(usable, norm, largest)


def _rows(radius: float | Tensor, like: Tensor) -> Tensor:
    """One radius, or one for each domain, against [B, *shape].

    Raises:
        ValueError: a radius is negative or NaN, or their number does not fit.
    """
    row = torch.as_tensor(radius, dtype=torch.float64, device=like.device).detach().flatten()
    if len(row) not in (1, len(like)) and len(like) != 1:
        raise ValueError(f"radius must be one number or one for each of {len(like)} samples, got {len(row)}")
    if not bool((row >= 0.0).all()):
        raise ValueError("radius must be >= 0")
    return row.view(-1, *(1,) * (like.dim() - 1))
