"""Average distortion, the study's measure of robustness."""

import torch
from torch import Tensor


def average_distortion(
    perturbed: Tensor,  # [B, ...]
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """Distortion of each image: sqrt(sum (x' - x)^2 / n) over its n pixel values (Szegedy et al. 2013); [B] float64.

    The distortion has the units of the images and lies between 0 and 1 for images in [0, 1]. Its mean over images is
    their average distortion.

    Args:
        perturbed: perturbed images, [B, ...].
        inputs: the original images, like ``perturbed``.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> import fastlip
        >>> images = torch.rand(4, 3, 2, 2)
        >>> perturbed = images + 0.01 * torch.randn_like(images)
        >>> print(fastlip.metrics.average_distortion(perturbed, images).mean())
    """
    if perturbed.shape != inputs.shape or inputs.dim() < 2:
        raise ValueError(
            f"perturbed and inputs must have one shape [B, ...], got {list(perturbed.shape)} and {list(inputs.shape)}"
        )
    if len(inputs) == 0:
        return torch.zeros(0, dtype=torch.float64, device=inputs.device)
    return (perturbed.double() - inputs.double()).flatten(1).square().mean(1).sqrt()
