"""The shapes and textures of the generated images, as functions of the plane."""

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def _polar(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.hypot(u, v), torch.atan2(v, u)


def _petals(count: int, depth: float) -> Field:
    def level(u: Tensor, v: Tensor) -> Tensor:
        r, angle = _polar(u, v)
        return r - (1 - depth) - depth * torch.cos(count * angle)

    return level


def _polygon(sides: int) -> Field:
    wedge = 2 * torch.pi / sides

    def level(u: Tensor, v: Tensor) -> Tensor:
        r, angle = _polar(u, v)
        return r * torch.cos(torch.remainder(angle, wedge) - wedge / 2) - 0.72

    return level


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(u.abs() - width, v.abs() - height)


#: Level functions on about [-1, 1]^2, negative inside; u and v are in the shape's own turned and scaled frame.
SHAPES: dict[str, Field] = {
    "disc": lambda u, v: torch.hypot(u, v) - 0.85,
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "triangle": _polygon(3),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.25,
    "cross": lambda u, v: torch.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "star": _petals(5, 0.3),
    "bar": lambda u, v: _box(u, v, 1.1, 0.32),
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 0.95, 0.75 - torch.hypot(u - 0.5, v)),
    "corner": lambda u, v: torch.minimum(_box(u + 0.55, v, 0.3, 0.85), _box(u, v - 0.55, 0.85, 0.3)),
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.65).abs() - 0.2,
    "trefoil": _petals(3, 0.4),
    "bow": lambda u, v: torch.maximum(v.abs() - 0.9 * u.abs() - 0.05, u.abs() - 0.95),
}

#: Textures with values in [-1, 1]; u and v are in the texture's turned frame, scaled to its period.
TEXTURES: dict[str, Field] = {
    "plain": lambda u, v: torch.ones_like(u),
    "stripes": lambda u, v: torch.sin(u),
    "checks": lambda u, v: (torch.sin(u) * torch.sin(v) * 4).tanh(),
    "dots": lambda u, v: ((torch.cos(u) + torch.cos(v) - 0.8) * 3).tanh(),
    "waves": lambda u, v: torch.sin(u + 1.5 * torch.sin(v * 0.7)),
    "rings": lambda u, v: torch.sin(torch.hypot(u, v)),
}
