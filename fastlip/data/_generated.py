"""Labelled 32x32 images drawn by a program, for machines without data and without a network."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastlip.data._image_set import ImageSet
from fastlip.data._shapes import SHAPES, TEXTURES

Task = Literal["source", "target"]
Split = Literal["train", "test"]

_SIZE = 32
_CHUNK = 2048

#: Each class is a shape with the texture and the hue (in turns of the colour wheel) that it mostly has. The two tasks
#: share textures, hues and kinds of edges, not shapes.
_CLASSES: dict[str, tuple[tuple[str, str, float], ...]] = {
    "source": tuple(
        (shape, texture, (2 * i + j) / 12)
        for i, shape in enumerate(("disc", "square", "triangle", "ring", "cross", "star"))
        for j, texture in enumerate(("stripes", "checks"))
    ),
    "target": (
        ("bar", "dots", 0 / 6),
        ("crescent", "stripes", 1 / 6),
        ("corner", "waves", 2 / 6),
        ("frame", "checks", 3 / 6),
        ("trefoil", "rings", 4 / 6),
        ("bow", "plain", 5 / 6),
    ),
}

#: Share of images whose texture is drawn at random, and spread of the hue in turns: none of shape, texture and hue
#: tells the class alone.
_MIXED = 0.2
_HUE_SPREAD = 0.06


def generated(task: Task, split: Split, n: int, seed: int = 0) -> ImageSet:
    """Textured shapes in front of clutter: ``n`` images of 32x32, as many of each class to within one.

    Position, size, rotation, hue, texture period, background, light and noise vary, and one image in five has a texture
    drawn at random. "source" and "target" have different classes (12 and 6) that share textures, hues and kinds of
    edges, so that what is learnt on one helps on the other.

    Args:
        task: "source" or "target".
        split: "train" or "test"; never share an image.
        n: number of images.
        seed: of everything; the same arguments give the same images.

    Raises:
        ValueError: a name is unknown or ``n`` is below 1.

    Example:
        >>> import fastlip
        >>> images = fastlip.data.generated("target", "test", 12)
        >>> for x, labels in images.batches(6):
        ...     print(x.shape, labels)
    """
    if task not in _CLASSES:
        raise ValueError(f"task must be 'source' or 'target', got {task!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    kinds = _CLASSES[task]
    key = [seed, list(_CLASSES).index(task), ("train", "test").index(split)]
    labels = np.random.default_rng([*key, 0]).permutation(np.arange(n) % len(kinds))
    images = torch.empty(n, 3, _SIZE, _SIZE, dtype=torch.uint8)
    for i in range(0, n, _CHUNK):
        rng = np.random.default_rng([*key, 1, i])
        images[i : i + _CHUNK] = _draw(torch.from_numpy(labels[i : i + _CHUNK]), kinds, rng)
    classes = tuple(f"{shape}, {texture}" for shape, texture, _ in kinds)
    return ImageSet(images, torch.from_numpy(labels), classes, f"generated {task}", generated=True)


def _draw(
    labels: Tensor,  # [N]
    kinds: tuple[tuple[str, str, float], ...],
    rng: np.random.Generator,
) -> Tensor:
    """Images of the classes ``labels``, [N, 3, 32, 32] uint8."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    axis = (torch.arange(_SIZE) + 0.5) * (2 / _SIZE) - 1
    x, y = axis[None, None, :] - uniform(-0.25, 0.25, 1, 1), axis[None, :, None] - uniform(-0.25, 0.25, 1, 1)
    size = uniform(0.55, 0.85, 1, 1)
    u, v = _turned(x / size, y / size, uniform(-0.5, 0.5, 1, 1))

    frequency = 2 * math.pi / uniform(0.35, 0.6, 1, 1)
    tu, tv = _turned(x * frequency, y * frequency, uniform(-math.pi, math.pi, 1, 1))
    mixed = uniform(0, 1) < _MIXED
    drawn = torch.from_numpy(rng.integers(len(TEXTURES), size=n))

    names = list(TEXTURES)
    own = torch.tensor([names.index(texture) for _, texture, _ in kinds])[labels]
    worn = torch.where(mixed, drawn, own)
    level, pattern = torch.empty_like(u), torch.empty_like(u)
    for c, (shape, _, _) in enumerate(kinds):
        rows = labels == c
        level[rows] = SHAPES[shape](u[rows], v[rows])
    for t, texture in enumerate(TEXTURES.values()):
        rows = worn == t
        pattern[rows] = texture(tu[rows], tv[rows])

    # Edges about a pixel wide, as a camera would see them.
    inside = torch.sigmoid(-level * size * _SIZE)[:, None]
    hue = torch.tensor([hue for _, _, hue in kinds])[labels]
    hue = hue + _HUE_SPREAD * torch.from_numpy(rng.standard_normal(n, dtype=np.float32))
    wheel = torch.cos(2 * math.pi * (hue[:, None] - torch.arange(3) / 3))[:, :, None, None]
    colour = uniform(0.35, 0.65, 1, 1, 1) + uniform(0.2, 0.4, 1, 1, 1) * wheel
    contrast = uniform(0.1, 0.25, 1, 1, 1)
    figure = colour + contrast * pattern[:, None]
    clutter = uniform(-1, 1, 3, 6, 6)
    clutter = functional.interpolate(clutter, size=(_SIZE, _SIZE), mode="bicubic", align_corners=False)
    ground = uniform(0.2, 0.8, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1) + uniform(0.05, 0.2, 1, 1, 1) * clutter
    image = ground + inside * (figure - ground)

    lu, _ = _turned(axis[None, None, :], axis[None, :, None], uniform(-math.pi, math.pi, 1, 1))
    light = uniform(0.8, 1.2, 1, 1, 1) * (1 + uniform(0, 0.25, 1, 1, 1) * lu[:, None])
    noise = torch.from_numpy(rng.standard_normal((n, 3, _SIZE, _SIZE), dtype=np.float32))
    image = image * light + uniform(0.01, 0.06, 1, 1, 1) * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
