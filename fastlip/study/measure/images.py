"""The evaluated images in batches, and the arrays [N] of what is measured on them."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastlip.data import ImageSet

Arrays = dict[str, np.ndarray]

Progress = Callable[[int, int, str], None]

#: Number of images whose pixels are stored with the measurements, as examples for the report.
KEPT = 64


class Images:
    """The evaluated images with their labels and ids; an image's random draws depend on its id."""

    def __init__(self, images: ImageSet, device: torch.device, batch_size: int) -> None:
        self.pixels = images.images  # [N, C, H, W] uint8
        self.labels = images.labels.to(device)  # [N] int64
        self.ids = torch.arange(len(images), device=device)
        self.device = device
        self.batch_size = batch_size
        self.part = (0, 1)

    def shard(self, rank: int, size: int) -> "Images":
        """The same images, of which :meth:`batches` yields every ``size``-th batch, beginning with number ``rank``."""
        part = copy.copy(self)
        part.part = (rank, size)
        return part

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, progress: Progress) -> Iterator[slice]:
        """The rows of each batch; ``progress`` is called after each."""
        n, (rank, size) = len(self), self.part
        for i in range(rank * self.batch_size, n, size * self.batch_size):
            progress(i, n, "")
            yield slice(i, min(i + self.batch_size, n))
        progress(n, n, "")

    def first(self, n: int) -> "Images":
        """The first ``n`` images, or all if there are fewer."""
        part = copy.copy(self)
        part.pixels, part.labels, part.ids = self.pixels[:n], self.labels[:n], self.ids[:n]
        return part

    def at(self, rows: slice) -> Tensor:
        """The images of these rows in [0, 1]: float32, channels_last."""
        x = self.pixels[rows].to(self.device).float().div_(255)
        return x.contiguous(memory_format=torch.channels_last)


def concatenated(parts: list[dict[str, Tensor]]) -> Arrays:
    """The batches concatenated; empty where this process had none."""
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in (parts[0] if parts else ())}


def merged(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Merge the per-image arrays of all processes into those that one process would have computed.

    Rows are sorted by "id". An array with fewer rows than "id" ("image") belongs to the lowest ids.
    """
    parts = [part for part in parts if part]
    order = np.argsort(np.concatenate([part["id"] for part in parts]), kind="stable")
    found = {}
    for name in parts[0]:
        whole = np.concatenate([part[name] for part in parts])
        if len(whole) == len(order):
            found[name] = whole[order]
        else:
            kept = np.concatenate([np.sort(part["id"])[: len(part[name])] for part in parts])
            found[name] = whole[np.argsort(kept, kind="stable")]
    return found
