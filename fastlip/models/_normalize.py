"""Input normalisation as part of the network, so that attacks see images in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std for each channel of [B, C, H, W].

    Args:
        mean: C numbers.
        std: C positive numbers.

    Raises:
        ValueError: the lengths differ, or a std is not positive.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(fastlip.models.Normalize([0.5] * 3, [0.25] * 3), nn.Conv2d(3, 4, 3))
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std must have one length and std be positive, got {list(mean)} and {list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """Return the normalised images, [B, C, H, W]."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
