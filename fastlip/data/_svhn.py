"""SVHN (Netzer et al. 2011), cropped house numbers, through torchvision."""

import os
from pathlib import Path

import torch

from fastlip.data._extra import torchvision_datasets
from fastlip.data._image_set import ImageSet


def svhn(root: str | os.PathLike[str], train: bool, download: bool = False) -> ImageSet:
    """SVHN's training images (73,257) or test images (26,032): digits at 32x32, with neighbours at their sides.

    Args:
        root: folder that holds ``train_32x32.mat`` and ``test_32x32.mat``.
        train: training images rather than test images.
        download: fetch the published file into ``root`` where it is missing.

    Raises:
        FileNotFoundError: the file is missing and ``download`` is False.
        ValueError: the file is damaged (its MD5 differs from the published one).
        OSError: the download failed.
        ImportError: torchvision or SciPy, which reads the file, is missing.

    Example:
        >>> import fastlip
        >>> try:
        ...     images = fastlip.data.svhn("data", train=False)
        ... except FileNotFoundError as error:
        ...     print(error)  # which file is missing
    """
    dataset = torchvision_datasets().SVHN
    split = "train" if train else "test"
    file = Path(root) / dataset.split_list[split][1]
    absent = not file.is_file()
    by_hand = f"put the published {file.name} there"
    fix = f"pass download=True (--download), or {by_hand}"
    if absent and not download:
        raise FileNotFoundError(f"SVHN: {file} is missing; {fix}")
    try:
        found = dataset(os.fspath(root), split=split, download=absent)
    except (RuntimeError, OSError) as error:
        if absent:
            raise OSError(f"SVHN could not be downloaded into {root} ({error}); {by_hand}") from None
        if isinstance(error, OSError):
            raise
        raise ValueError(f"SVHN: {file} is damaged; delete it and {fix}") from None
    except ModuleNotFoundError:
        raise ImportError('reading SVHN needs SciPy: pip install "fastlip[study]"') from None
    images = torch.from_numpy(found.data).contiguous()
    return ImageSet(images, torch.from_numpy(found.labels), tuple("0123456789"), "SVHN")
