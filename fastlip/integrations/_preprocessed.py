"""A network with the preprocessing that another library does for it."""

from torch import Tensor, nn


class Preprocessed(nn.Module):
    """network((flip(x) - mean) / std) as a module, of which :func:`fastlip.attacks.prepare` can make a faster copy.

    Args:
        network: maps preprocessed images to logits.
        mean: subtracted, broadcast to the images; nothing if None.
        std: divided by, likewise.
        flip: axis to flip, as from RGB to BGR; none if None.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, network: nn.Module, mean: Tensor | None, std: Tensor | None, flip: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.flip = flip

    def forward(
        self,
        x: Tensor,  # [B, ...]
    ) -> Tensor:
        """Return the network's logits, [B, C]."""
        if self.flip is not None:
            x = x.flip(self.flip)
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        out: Tensor = self.network(x)
        return out
