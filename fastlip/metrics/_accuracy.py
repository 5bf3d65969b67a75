"""Correctness of a model's decisions."""

from collections.abc import Callable

import torch
from torch import Tensor


def accuracy(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    batch_size: int = 256,
) -> Tensor:
    """Whether each image is classified correctly, [B] bool; logits that hold a NaN are never correct.

    The model's mode is not changed, so put it in eval mode first. The mean of the result is the accuracy, and
    :func:`fastlip.metrics.clopper_pearson` gives its interval.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [B, ...].
        labels: true classes, [B] int64.
        batch_size: number of images in a forward pass.

    Raises:
        ValueError: ``labels`` does not have one entry for each image, or ``batch_size`` is below 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> print(fastlip.metrics.accuracy(model, images, labels).float().mean())
    """
    if labels.shape != inputs.shape[:1]:
        raise ValueError(f"labels must have shape [{inputs.shape[0]}], got {list(labels.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    correct = torch.zeros_like(labels, dtype=torch.bool)
    with torch.no_grad():
        for i in range(0, len(inputs), batch_size):
            logits = model(inputs[i : i + batch_size].clone())  # the model may work in place
            right = logits.argmax(1) == labels[i : i + batch_size]
            correct[i : i + batch_size] = right & ~logits.isnan().any(1)
    return correct
