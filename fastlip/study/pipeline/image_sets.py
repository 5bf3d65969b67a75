"""The sets of images that the command line names: data sets that torchvision reads, folders, Hugging Face data sets."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from fastlip._downloads import patience
from fastlip.data import (
    ImageSet,
    cifar10,
    cifar100,
    folder_listing,
    hugging_face,
    hugging_face_fingerprint,
    image_folder,
    svhn,
)
from fastlip.study.errors import StudyError, first_line
from fastlip.study.settings.input_paths import hugging_face_name

#: Images for training or for testing; None for training images that no test images need be kept from.
Part = Literal["train", "test"] | None


class _Named(NamedTuple):
    """A data set that torchvision reads."""

    title: str
    read: Callable[..., ImageSet]
    files: str


_NAMED = {
    "cifar10": _Named("CIFAR-10", cifar10, "cifar-10-batches-py"),
    "cifar100": _Named("CIFAR-100", cifar100, "cifar-100-python"),
    "svhn": _Named("SVHN", svhn, "train_32x32.mat and test_32x32.mat"),
}


class GivenImages:
    """Images by what the command line calls them.

    Args:
        given: "cifar10", "cifar100", "svhn", "hf:NAME" or a folder.
        data: folder of the files of those that torchvision reads; the user's cache if None.
        size: height and width that the images of a folder or of "hf:NAME" are brought to.
        parts: those that are used.
    """

    def __init__(self, given: str | Path, data: Path | None, size: int, parts: tuple[Part, ...]) -> None:
        self._given = str(given)
        self._named = _NAMED.get(self._given)
        self._data = data
        self._size = size
        self._parts = parts
        self._read: dict[tuple[Part, int, int], ImageSet] = {}

    def images(self, part: Part, n: int, after: int = 0) -> ImageSet:
        """``n`` images with as many of each class, to within one; without those of ``images(part, after)``.

        Raises:
            OSError: files are missing.
            StudyError: a class has too few images, files are damaged, or the library that reads them is missing.
        """
        key = (part, n, after)
        if key not in self._read:
            with _readable():
                self._read[key] = self._balanced(part, n, after)
        return self._read[key]

    def fetch(self, download: bool) -> None:
        """Fetch the files that torchvision reads where they are missing and ``download`` allows it.

        Raises:
            OSError: they are missing and cannot be fetched.
            StudyError: they are damaged, or the library that reads them is missing.
        """
        if self._named is None:
            return
        for part in self._parts:
            with _readable():
                try:
                    self._whole(part)
                except FileNotFoundError:
                    if not download:
                        raise FileNotFoundError(f"no {self._named.title} in {self._folder}") from None
                    try:
                        with unless_new(self._folder), patience(10.0):
                            self._named.read(self._folder, train=part != "test", download=True)
                    except OSError as error:
                        missing = f"no {self._named.title} in {self._folder}, and it is not to be had"
                        raise FileNotFoundError(f"{missing} ({first_line(error)})") from None

    @property
    def remedy(self) -> str | None:
        """How to give the files where torchvision reads them."""
        if self._named is None:
            return None
        return f"give --data DIR (or FASTLIP_DATA) with the {self._named.title} files in DIR/{self._named.files}"

    @property
    def title(self) -> str:
        """What the images are called before they are read."""
        if self._named is not None:
            return self._named.title
        name = hugging_face_name(self._given)
        return Path(name).resolve().name if Path(name).is_dir() else name

    @cached_property
    def whole_test(self) -> ImageSet:
        """All test images of a data set that torchvision reads, in the order of its files."""
        return self._whole("test")

    @cached_property
    def _whole_train(self) -> ImageSet:
        return self._whole("train")

    def fingerprint(self) -> str:
        """A fingerprint of the images, which changes with their contents."""
        if self._named is not None:
            return f"{self._named.title}, MD5 checked"
        with _readable():
            if self._given.startswith("hf:"):
                return hugging_face_fingerprint(hugging_face_name(self._given))
            digest = hashlib.sha256()
            for part in self._parts:
                found = folder_listing(self._given, part)
                for path, label in zip(found.paths, found.labels.tolist(), strict=True):
                    digest.update(f"{path.relative_to(self._given)} {label} {path.stat().st_size}\n".encode())
        return "names and sizes, sha256 " + digest.hexdigest()

    def _balanced(self, part: Part, n: int, after: int) -> ImageSet:
        if self._named is not None:
            return (self.whole_test if part == "test" else self._whole_train).balanced(n, after=after)
        if self._given.startswith("hf:"):
            return hugging_face(hugging_face_name(self._given), self._size, part or "train", n, after)
        return image_folder(self._given, self._size, part, n, after)

    def _whole(self, part: Part) -> ImageSet:
        assert self._named is not None
        return self._named.read(self._folder, train=part != "test")

    @property
    def _folder(self) -> Path:
        if self._data is not None:
            return self._data
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastlip"


@contextmanager
def unless_new(folder: Path) -> Iterator[None]:
    """Remove ``folder`` where the block creates it and then fails."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what the readers of images raise about contents and libraries into a :class:`StudyError`."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise StudyError(str(error), status=2) from None
