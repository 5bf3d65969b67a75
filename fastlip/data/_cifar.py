"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision."""

import os
from pathlib import Path
from typing import Any

import torch

from fastlip.data._extra import torchvision_datasets
from fastlip.data._image_set import ImageSet


def cifar10(root: str | os.PathLike[str], train: bool, download: bool = False) -> ImageSet:
    """CIFAR-10's training images (50,000) or test images (10,000).

    Args:
        root: folder that holds ``cifar-10-batches-py``.
        train: training images rather than test images.
        download: fetch the published archive into ``root`` where the files are missing.

    Raises:
        FileNotFoundError: the files are missing and ``download`` is False.
        ValueError: a file is damaged (its MD5 differs from the published one).
        OSError: the download failed.
        ImportError: torchvision is missing.

    Example:
        >>> import fastlip
        >>> try:
        ...     images = fastlip.data.cifar10("data", train=True)
        ... except FileNotFoundError as error:
        ...     print(error)  # which file is missing
    """
    return _read("CIFAR-10", torchvision_datasets().CIFAR10, root, train, download)


def cifar100(root: str | os.PathLike[str], train: bool, download: bool = False) -> ImageSet:
    """CIFAR-100's training images (50,000) or test images (10,000) with their 100 fine labels.

    Args:
        root: folder that holds ``cifar-100-python``.
        train: training images rather than test images.
        download: fetch the published archive into ``root`` where the files are missing.

    Raises:
        FileNotFoundError: the files are missing and ``download`` is False.
        ValueError: a file is damaged (its MD5 differs from the published one).
        OSError: the download failed.
        ImportError: torchvision is missing.

    Example:
        >>> import fastlip
        >>> try:
        ...     images = fastlip.data.cifar100("data", train=True)
        ... except FileNotFoundError as error:
        ...     print(error)  # which file is missing
    """
    return _read("CIFAR-100", torchvision_datasets().CIFAR100, root, train, download)


def _read(name: str, dataset: Any, root: str | os.PathLike[str], train: bool, download: bool) -> ImageSet:
    folder = Path(root) / dataset.base_folder
    by_hand = f"unpack {dataset.filename} there"
    fix = f"pass download=True (--download), or {by_hand}"
    needed = [file for file, _ in (*dataset.train_list, *dataset.test_list)] + [dataset.meta["filename"]]
    absent = [file for file in needed if not (folder / file).is_file()]
    if absent and not download:
        raise FileNotFoundError(f"{name}: {folder / absent[0]} is missing; {fix}")
    try:
        # torchvision checks every file against its MD5 before it unpickles any.
        found = dataset(os.fspath(root), train=train, download=bool(absent))
    except (RuntimeError, OSError) as error:
        if absent:
            raise OSError(f"{name} could not be downloaded into {root} ({error}); {by_hand}") from None
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{name}: a file in {folder} is damaged; delete that folder and {fix}") from None
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(found.targets), tuple(found.classes), name)
