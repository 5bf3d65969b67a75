"""CIFAR-10-C: CIFAR-10's test images under common corruptions (Hendrycks and Dietterich 2019)."""

import os
from pathlib import Path

import numpy as np
import torch

from fastlip.data._image_set import ImageSet

#: Test images at each severity, in CIFAR-10's order.
_EACH = 10_000


def cifar10_c(root: str | os.PathLike[str], corruption: str, severity: int, classes: tuple[str, ...]) -> ImageSet:
    """The 10,000 test images under one corruption at one severity, from the published files.

    Args:
        root: folder that holds ``<corruption>.npy`` [50000, 32, 32, 3] uint8 and ``labels.npy`` [50000].
        corruption: for instance "gaussian_noise".
        severity: 1 to 5.
        classes: names of CIFAR-10's classes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another shape or type, or ``severity`` is out of range.

    Example:
        >>> import fastlip
        >>> try:
        ...     images = fastlip.data.cifar10_c("CIFAR-10-C", "fog", 3, ("airplane", "automobile"))
        ... except FileNotFoundError as error:
        ...     print(error)  # which file is missing
    """
    if not 1 <= severity <= 5:
        raise ValueError(f"severity must lie from 1 to 5, got {severity}")
    pixels = _load(Path(root) / f"{corruption}.npy", (5 * _EACH, 32, 32, 3))
    labels = _load(Path(root) / "labels.npy", (5 * _EACH,))
    rows = slice((severity - 1) * _EACH, severity * _EACH)
    images = torch.from_numpy(np.ascontiguousarray(pixels[rows].transpose(0, 3, 1, 2)))
    name = f"CIFAR-10-C, {corruption}, severity {severity}"
    return ImageSet(images, torch.from_numpy(labels[rows].astype(np.int64)), classes, name)


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An integer array of the shape that the published files have; only the rows used are read."""
    if not path.is_file():
        raise FileNotFoundError(f"CIFAR-10-C: {path} is missing")
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"CIFAR-10-C: {path} is damaged ({error})") from None
    if found.shape != shape or found.dtype.kind not in "iu":
        raise ValueError(f"CIFAR-10-C: {path} must hold integers {list(shape)}, got {found.dtype} {list(found.shape)}")
    return found
