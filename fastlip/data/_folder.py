"""Any folder of images, one folder for each class, with or without folders for training and testing."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastlip.data._extra import torchvision_datasets
from fastlip.data._image_set import ImageSet, balanced_rows
from fastlip.data._pixels import rgb
from fastlip.data._split import SPLIT_IN_WORDS, rows_of

#: Names of the folder of test images, in the order of preference.
_TEST = ("test", "val")


class Listing(NamedTuple):
    """The images of a folder, not read yet.

    Attributes:
        root: the folder that ``paths`` lie in.
        paths: [N] files in the order of their names within each class.
        labels: [N] int64, indices into ``classes``.
        classes: names of the classes.
        name: what to call the images in a report.
    """

    root: Path
    paths: list[Path]
    labels: Tensor
    classes: tuple[str, ...]
    name: str


def write_folder(images: ImageSet, folder: str | os.PathLike[str]) -> None:
    """Write images as lossless files ``FOLDER/CLASS/NUMBER.png``, as :func:`image_folder` and others read them.

    Args:
        images: what to write; numbers count the images of a class, in their order.
        folder: made if it is missing.

    Raises:
        FileExistsError: there is something in ``folder``.
        ImportError: Pillow is missing.

    Example:
        >>> import fastlip
        >>> images = fastlip.data.generated("target", "test", 12)
        >>> fastlip.data.write_folder(images, "shapes")
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('images are written by Pillow: pip install "fastlip[study]"') from None
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty")
    for label, name in enumerate(images.classes):
        (root / name).mkdir()
        for number, pixels in enumerate(images.images[images.labels == label]):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / name / f"{number:05d}.png")


def image_folder(
    root: str | os.PathLike[str],
    size: int = 32,
    split: Literal["train", "test"] | None = None,
    n: int | None = None,
    after: int = 0,
) -> ImageSet:
    """Images of a folder with one folder for each class, in the order of their paths, at ``size`` x ``size``.

    An image of another size is cut to its central square and resized (bicubic, with antialiasing). Grey-scale images
    get three equal channels, and transparency is dropped.

    Args:
        root: folder of torchvision's ImageFolder layout, for instance CIFAR-100 or ImageNet's training images.
        size: height and width.
        split: "train" or "test" for the images under ``root/train/<class>/`` or ``root/test/<class>/``
            (``root/val/<class>/`` where there is no ``test``); where ``root`` holds classes itself, every class is
            split by a fixed seed, a fifth of it for testing, and the name says so. None for all images under
            ``root/<class>/``, or for those of "train" where there are such folders.
        n: read only so many images, as many of each class to within one; all if None.
        after: leave out the images that so large an ``n`` would read.

    Raises:
        FileNotFoundError: there is no such folder, or a class has no images.
        ValueError: an image cannot be read, the classes for training and testing differ, or a class has too few images
            for ``n``.
        ImportError: torchvision is missing.

    Example:
        >>> import fastlip
        >>> images = fastlip.data.generated("target", "test", 12)
        >>> fastlip.data.write_folder(images, "shapes")
        >>> print(len(fastlip.data.image_folder("shapes", size=16)))
    """
    found = folder_listing(root, split)
    rows = torch.arange(len(found.paths))
    if n is not None:
        rows = balanced_rows(found.labels, len(found.classes), n, found.name, after=after)
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for i, row in enumerate(rows.tolist()):
        images[i] = _pixels(found.paths[row], size)
    return ImageSet(images, found.labels[rows], found.classes, found.name)


def folder_listing(root: str | os.PathLike[str], split: Literal["train", "test"] | None = None) -> Listing:
    """The images that :func:`image_folder` would read, by their paths and labels.

    Raises:
        FileNotFoundError: there is no such folder, or a class has no images.
        ValueError: the classes for training and testing differ.
        ImportError: torchvision is missing.

    Example:
        >>> import fastlip
        >>> images = fastlip.data.generated("target", "test", 12)
        >>> fastlip.data.write_folder(images, "shapes")
        >>> print(fastlip.data.folder_listing("shapes").paths[0])
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist")
    train, test = _split_folders(root)
    if split is None and train is None:
        return _listed(root, root.resolve().name)
    if split is not None and train is None and test is None:
        found = _listed(root, f"{root.resolve().name} ({SPLIT_IN_WORDS})")
        rows = rows_of(split, found.labels, found.classes, found.name)
        return found._replace(paths=[found.paths[row] for row in rows.tolist()], labels=found.labels[rows])
    wanted = test if split == "test" else train
    if wanted is None:
        other = " or ".join(_TEST) if split == "test" else "train"
        raise FileNotFoundError(f"image folder {root} must hold a folder {other} beside {(train or test or root).name}")
    found = _listed(wanted, root.resolve().name)
    other_folder = train if split == "test" else test
    if other_folder is not None:
        there = _class_names(other_folder)
        for name in sorted(set(there) ^ set(found.classes)):
            has, lacks = (other_folder, wanted) if name in there else (wanted, other_folder)
            raise ValueError(f"image folder {root}: the class {name} is in {has.name} and not in {lacks.name}")
    return found


def _split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of training and test images, which hold folders of classes; a class may be called "train", too."""
    folders = [next((root / n for n in names if _class_names(root / n)), None) for names in (("train",), _TEST)]
    return folders[0], folders[1]


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _listed(folder: Path, name: str) -> Listing:
    try:
        found = torchvision_datasets().ImageFolder(os.fspath(folder))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"image folder {folder} must hold a folder of images for each class: {reason}"
        ) from None
    paths = [Path(path) for path, _ in found.samples]
    return Listing(folder, paths, torch.tensor(found.targets), tuple(found.classes), name)


def _pixels(path: Path, size: int) -> Tensor:
    """RGB pixels, [3, size, size] uint8."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return torch.from_numpy(rgb(opened, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None
