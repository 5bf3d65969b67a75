"""A network together with the preprocessing that another library applies."""

from torch import Tensor, nn


class Preprocessed(nn.Module):
    """network((flip(x) - mean) / std) as a module that :func:`fastlip.attacks.prepare` can copy.

    Args:
        network: maps preprocessed images to logits.
        mean: subtracted from the images, to which it is broadcast; nothing is subtracted if None.
        std: divides the images, likewise.
        flip: the axis to flip, for example from RGB to BGR; no axis is flipped if None.
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
