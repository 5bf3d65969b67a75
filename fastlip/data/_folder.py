"""Any folder of images, one folder for each class."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlip.data._extra import torchvision_datasets
from fastlip.data._image_set import ImageSet


def image_folder(root: str | os.PathLike[str], size: int = 32) -> ImageSet:
    """Images under ``root/<class>/``, in the order of their paths, at ``size`` x ``size``.

    An image of another size is cut to its central square and resized (bicubic, with antialiasing).

    Args:
        root: folder of torchvision's ImageFolder layout, for instance CIFAR-100 or ImageNet's training images.
        size: height and width.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images in class folders.
        ValueError: an image cannot be read.
        ImportError: torchvision is missing.
    """
    datasets = torchvision_datasets()
    if not Path(root).is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist")
    try:
        found = datasets.ImageFolder(os.fspath(root), loader=lambda path: _pixels(path, size))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"image folder {root} must hold a folder of images for each class: {reason}") from None
    images = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    for i in range(len(found)):
        images[i] = torch.from_numpy(found[i][0])
    return ImageSet(images, torch.tensor(found.targets), tuple(found.classes), Path(root).resolve().name)


def _pixels(path: str, size: int) -> Any:
    """RGB pixels, [3, size, size] uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.array(image).transpose(2, 0, 1)
