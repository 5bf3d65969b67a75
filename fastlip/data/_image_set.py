"""Images with their labels, held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: [N, 3, H, W] uint8.
        labels: [N] int64, indices into ``classes``.
        classes: names of the classes.
        name: what to call the set in a report.
        generated: whether the images were drawn by a program rather than taken of the world.

    Example:
        >>> import torch
        >>> import fastlip
        >>> pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        >>> images = fastlip.data.ImageSet(pixels, labels, ("cat", "dog"), "pets")
        >>> print(len(images.balanced(2)))
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    generated: bool = False

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            raise ValueError(f"images must be [N, 3, H, W] uint8, got {list(self.images.shape)} {self.images.dtype}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be [{len(self.images)}] int64, got {list(self.labels.shape)} {self.labels.dtype}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"labels must lie in [0, {len(self.classes)})")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(
        self,
        rows: Tensor,  # [M] int64 or [N] bool
    ) -> "ImageSet":
        """The images at ``rows``."""
        return ImageSet(self.images[rows], self.labels[rows], self.classes, self.name, self.generated)

    def balanced(self, n: int, seed: int = 0, after: int = 0) -> "ImageSet":
        """A random ``n`` images with as many of each class, to within one; in the order of the set.

        Args:
            n: images to keep.
            seed: decides which; a larger n with the same seed contains the smaller one's images.
            after: leave out the images that ``balanced(after, seed)`` returns, so that the two share none.

        Raises:
            ValueError: a class has too few images, or a number is negative.
        """
        return self.subset(balanced_rows(self.labels, len(self.classes), n, self.name, seed, after))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as float32 [b, 3, H, W] in [0, 1] with their labels [b], in order.

        Args:
            batch_size: images in each batch but the last.

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for i in range(0, len(self), batch_size):
            yield self.images[i : i + batch_size].float() / 255, self.labels[i : i + batch_size]


def balanced_rows(
    labels: Tensor,  # [N] int64
    classes: int,
    n: int,
    name: str,
    seed: int = 0,
    after: int = 0,
) -> Tensor:
    """Rows of a random ``n`` images with as many of each class, to within one, in order, [n] int64.

    Args:
        labels: indices of the classes.
        classes: number of classes.
        n: images to keep.
        name: of the set, for the error.
        seed: decides which; a larger n with the same seed contains the smaller one's images.
        after: leave out the first so many of that order.

    Raises:
        ValueError: a class has too few images, or a number is negative.
    """
    if n < 0 or after < 0:
        raise ValueError(f"n and after must be at least 0, got {n} and {after}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    # Rank of each image within its class, in random order: the first n by (rank, class) are balanced and nested.
    ranks = torch.zeros_like(shuffled)
    for c in range(classes):
        members = (shuffled == c).nonzero().squeeze(1)
        ranks[members] = torch.arange(len(members))
    chosen = order[(ranks * classes + shuffled).argsort()[after : after + n]]
    counts = torch.bincount(labels[chosen], minlength=classes)
    if len(chosen) < n or int(counts.max() - counts.min()) > 1:
        raise ValueError(
            f"n = {after + n} images balanced over {classes} classes are more than {name} has: a class has "
            f"{int(torch.bincount(labels, minlength=classes).min())}"
        )
    return chosen.sort().values
