"""Image classification data sets in the format of the library ``datasets``, from the Hugging Face Hub or a folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fastlip.data._extra import hugging_face_datasets
from fastlip.data._image_set import ImageSet, balanced_rows
from fastlip.data._pixels import rgb
from fastlip.data._split import SPLIT_IN_WORDS, rows_of

#: Names of the split of test images, in the order of preference.
_TEST = ("test", "validation", "valid", "val")


class _Table(NamedTuple):
    """One split as rows of a table.

    Attributes:
        rows: the table, a ``datasets.Dataset``.
        image: name of the column of images.
        labels: [N] int64, indices into ``classes``.
        classes: names of the classes.
        name: what to call the set in a report.
    """

    rows: Any
    image: str
    labels: torch.Tensor
    classes: tuple[str, ...]
    name: str


def hugging_face(
    name: str,
    size: int = 32,
    split: Literal["train", "test"] = "train",
    n: int | None = None,
    after: int = 0,
) -> ImageSet:
    """Training or test images of a data set that ``datasets`` reads, at ``size`` x ``size``.

    The columns are found by their types: one of images and one of class labels. No code from the Hub is executed.
    Images of other sizes and modes are treated as by :func:`~fastlip.data.image_folder`.

    Args:
        name: a data set of the Hub such as "cifar10", or a folder that ``save_to_disk`` wrote or that holds Parquet
            files. Nothing is fetched where the environment variable ``HF_HUB_OFFLINE`` is set and all is cached.
        size: height and width.
        split: "train", or "test" ("validation", "valid" or "val" where there is no "test"). Where there is one split
            alone, every class is split by a fixed seed, a fifth of it for testing, and the name says so.
        n: read only so many images, as many of each class to within one; all if None.
        after: leave out the images that so large an ``n`` would read.

    Raises:
        OSError: the data set is not cached and cannot be fetched, or there is no such folder.
        ValueError: it is of another form, an image cannot be read, or a class has too few images for ``n``.
        ImportError: ``datasets`` is missing or older than version 4, which would execute code.

    Example:
        >>> import fastlip
        >>> try:
        ...     images = fastlip.data.hugging_face("./photos", size=32)  # a folder, or a name on the Hub
        ... except (ImportError, OSError) as error:
        ...     print(error)
    """
    found = _table(name, split)
    chosen = torch.arange(len(found.labels))
    if n is not None:
        chosen = balanced_rows(found.labels, len(found.classes), n, found.name, after=after)
    images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    for i, row in enumerate(chosen.tolist()):
        try:
            images[i] = torch.from_numpy(rgb(found.rows[row][found.image], size))
        except Exception as error:  # of Pillow, of arrow, or of datasets' decoder, which document none
            raise ValueError(f"{found.name}: image {row} cannot be read: {error}") from None
    return ImageSet(images, found.labels[chosen], found.classes, found.name)


def hugging_face_fingerprint(name: str) -> str:
    """A SHA-256 over classes, labels and sizes of all images of both splits.

    Raises:
        OSError: as :func:`hugging_face` does.
        ValueError: as :func:`hugging_face` does.
        ImportError: as :func:`hugging_face` does.

    Example:
        >>> import fastlip
        >>> try:
        ...     print(fastlip.data.hugging_face_fingerprint("./photos"))
        ... except (ImportError, OSError) as error:
        ...     print(error)
    """
    library = hugging_face_datasets()
    digest = hashlib.sha256()
    for split in ("train", "test"):
        found = _table(name, split)
        digest.update(f"{split} {found.classes}\n".encode())
        files = found.rows.cast_column(found.image, library.Image(decode=False))[found.image]
        for file, label in zip(files, found.labels.tolist(), strict=True):
            size = os.path.getsize(file["path"]) if file["bytes"] is None else len(file["bytes"])
            digest.update(f"{label} {size}\n".encode())
    return "labels and sizes, sha256 " + digest.hexdigest()


def _table(name: str, split: Literal["train", "test"]) -> _Table:
    splits = _splits(name)
    title = Path(name).resolve().name if Path(name).is_dir() else name
    wanted = ("train",) if split == "train" else _TEST
    alone = len(splits) == 1
    key = next((key for key in (*wanted, *(splits if alone else ())) if key in splits), None)
    if key is None:
        raise ValueError(f"{title} has the splits {', '.join(splits)}; expected {' or '.join(wanted)}")
    rows = splits[key]
    image, label, classes = _columns(title, rows.features)
    labels = torch.from_numpy(np.array(rows.with_format("numpy", columns=[label])[:][label], dtype=np.int64))
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"{title}: the split {split} has images without a label, or none at all")
    if alone:
        title = f"{title} ({SPLIT_IN_WORDS})"
        chosen = rows_of(split, labels, classes, title)
        rows, labels = rows.select(chosen.numpy()), labels[chosen]
    return _Table(rows, image, labels, classes, title)


def _columns(title: str, features: Any) -> tuple[str, str, tuple[str, ...]]:
    """The column of images, that of labels, and the names of the classes."""
    library = hugging_face_datasets()
    images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        raise ValueError(f"{title} must have one column of type Image and one of type ClassLabel; it has {columns}")
    return images[0], labels[0], tuple(features[labels[0]].names)


def _splits(name: str) -> dict[str, Any]:
    """The splits of the data set by name."""
    library = hugging_face_datasets()
    folder = Path(name)
    try:
        with _quiet(library):
            if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
                found = library.load_from_disk(name)
            else:
                found = library.load_dataset(name)
    except OSError as error:
        raise OSError(f"data set {name}: {_first_line(error)}") from None
    except Exception as error:  # datasets and the readers under it raise errors of many kinds for damaged files
        raise ValueError(f"data set {name} cannot be read: {_first_line(error)}") from None
    return dict(found) if isinstance(found, dict) else {"all": found}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without progress bars."""
    shown = library.are_progress_bars_disabled() is False
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()
