"""The images and source weights of a run, all checked before anything is written."""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights

from fastlip.data import ImageSet, cifar10, cifar10_c, generated, image_folder
from fastlip.models import imagenet_weights
from fastlip.study.errors import StudyError, first_line
from fastlip.study.pipeline.stage import derived_seed
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.settings.measurements import GENERATED_CORRUPTIONS
from fastlip.study.settings.settings import Settings
from fastlip.study.training.source_weights import read_source_weights, require_fit

_REMEDY = (
    "give --data DIR (or FASTLIP_DATA) with the CIFAR-10 files in DIR/cifar-10-batches-py, and either "
    "--source-checkpoint FILE with the source's weights or --source-data IMAGE_FOLDER to pre-train on"
)


class Inputs:
    """The images and source weights of a run; each is loaded on first use."""

    def __init__(self, settings: Settings, paths: InputPaths) -> None:
        self.settings = settings
        self.paths = paths

    def require_available(self) -> None:
        """Raise :class:`StudyError` with status 2 where an input is missing or does not fit the settings.

        Nothing is written but downloads.
        """
        self._check_arms()
        wanting = []
        checks = [self._check_target]
        if self.settings.transfers:
            checks.append(self._check_source)
        if self.settings.corrupted == "cifar10c":
            checks.append(self._check_corruptions)
        for look in checks:
            try:
                look()
            except OSError as error:
                wanting.append(first_line(error))
            except ValueError as error:
                raise StudyError(str(error), status=2) from None
        if wanting:
            raise StudyError(f"{'; '.join(wanting)}: {_REMEDY}", status=2)

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each input, which changes with its contents."""
        s = self.settings
        prints = {"target": "CIFAR-10, MD5 checked" if s.dataset == "cifar10" else "fastlip.data.generated"}
        if s.corrupted == "cifar10c":
            prints["corruptions"] = _names_and_sizes(self._corruption_files)
        if not s.transfers:
            return prints
        if s.source == "checkpoint":
            assert self.paths.source_checkpoint is not None
            with self.paths.source_checkpoint.open("rb") as file:
                prints["source"] = "sha256 " + hashlib.file_digest(file, "sha256").hexdigest()
        elif s.source == "folder":
            root = self._source_folder
            digest = hashlib.sha256()
            for name, label in ImageFolder(str(root)).samples:
                image = Path(name)
                digest.update(f"{image.relative_to(root)} {label} {image.stat().st_size}\n".encode())
            prints["source"] = "names and sizes, sha256 " + digest.hexdigest()
        else:
            prints["source"] = str(ResNet50_Weights.IMAGENET1K_V2) if s.source == "imagenet" else prints["target"]
        return prints

    @property
    def source_name(self) -> str:
        """The source of the transfer arms, in words for the report."""
        s = self.settings
        if s.source == "generated":
            return f"pre-training on {s.pretrain.images} generated images"
        if s.source == "folder":
            return f"pre-training on {s.pretrain.images} images of {self._source_folder.resolve().name}"
        return "torchvision's ImageNet weights" if s.source == "imagenet" else "a checkpoint given on the command line"

    @property
    def corruption_names(self) -> tuple[str, ...]:
        """The names of the corruptions measured."""
        if self.settings.corrupted == "generated":
            return GENERATED_CORRUPTIONS
        return tuple(path.stem for path in self._corruption_files if path.stem != "labels")

    @property
    def corrupted_files(self) -> Callable[[str, int], ImageSet] | None:
        """Reads the attacked images under a corruption and severity from CIFAR-10-C's files, if they are used."""
        if self.settings.corrupted == "generated":
            return None
        root, classes = self._corruption_folder, self.target_attacked.classes
        # These are the rows of the clean images, because the choice depends on the labels, which are the same.
        return lambda name, severity: cifar10_c(root, name, severity, classes).balanced(self.settings.evaluation.images)

    @cached_property
    def source_train(self) -> ImageSet:
        n, seed = self.settings.pretrain.images, self.settings.seed
        if self.settings.source == "generated":
            return generated("source", "train", n, seed)
        return image_folder(self._source_folder).balanced(n)

    def target_train(self, arm: str) -> ImageSet:
        """The training images of an arm."""
        places = self.settings.training_images(arm)
        if self.settings.dataset == "generated":
            # Images are drawn as they are asked for: other ones need another seed.
            seed = derived_seed(self.settings.seed, "disjoint") if places.start else self.settings.seed
            return generated("target", "train", len(places), seed)
        return self._cifar_train.balanced(len(places), after=places.start)

    @cached_property
    def target_clean(self) -> ImageSet:
        """The test images for clean accuracy."""
        return self._target_test(self.settings.evaluation.clean_images)

    @cached_property
    def target_attacked(self) -> ImageSet:
        """The test images that are attacked, which are among those for clean accuracy."""
        return self._target_test(self.settings.evaluation.images)

    def source_weights(self) -> dict[str, Tensor]:
        """The state dict of ImageNet's weights or of the given checkpoint."""
        if self.settings.source == "imagenet":
            return imagenet_weights()
        assert self.paths.source_checkpoint is not None
        return read_source_weights(self.paths.source_checkpoint)

    def _target_test(self, n: int) -> ImageSet:
        if self.settings.dataset == "generated":
            return generated("target", "test", self.settings.evaluation.clean_images, self.settings.seed).balanced(n)
        return self._cifar_test.balanced(n)

    @cached_property
    def _cifar_train(self) -> ImageSet:
        return cifar10(self._cifar_folder, train=True)

    @cached_property
    def _cifar_test(self) -> ImageSet:
        return cifar10(self._cifar_folder, train=False)

    @property
    def _cifar_folder(self) -> Path:
        if self.paths.data is not None:
            return self.paths.data
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastlip"

    @property
    def _source_folder(self) -> Path:
        assert self.paths.source_data is not None
        return self.paths.source_data

    @property
    def _corruption_folder(self) -> Path:
        assert self.paths.corruptions is not None
        return self.paths.corruptions

    @property
    def _corruption_files(self) -> list[Path]:
        return sorted(self._corruption_folder.glob("*.npy"))

    def _check_arms(self) -> None:
        """Raise where arms or settings ask for a source that the run does not train."""
        s = self.settings
        if s.pretrains:
            return
        if "matched" in s.arms:
            raise StudyError(
                "--set arms: matched sees as many images as the source and the fine-tuning together, and the run does "
                "not train the source: leave it out, or give an arm that starts from --source-data",
                status=2,
            )
        if s.sources == "each":
            raise StudyError("--set sources=each: the run does not train the source; give --source-data", status=2)

    def _check_corruptions(self) -> None:
        names = self.corruption_names if self._corruption_folder.is_dir() else ()
        if not names:
            raise StudyError(
                f"--corruptions {self._corruption_folder} must hold CIFAR-10-C's files, such as gaussian_noise.npy, "
                "and labels.npy",
                status=2,
            )
        for name in names:
            found = cifar10_c(self._corruption_folder, name, 1, self._cifar_test.classes)
            if not torch.equal(found.labels, self._cifar_test.labels):
                raise ValueError(f"--corruptions {self._corruption_folder}: labels.npy is not in CIFAR-10's order")

    def _check_target(self) -> None:
        s = self.settings
        if s.dataset == "generated":
            return
        try:
            cifar10(self._cifar_folder, train=False)
        except FileNotFoundError:
            if not self.paths.download:
                raise FileNotFoundError(f"no CIFAR-10 in {self._cifar_folder}") from None
            with _unless_new(self._cifar_folder), _patience(10.0):
                cifar10(self._cifar_folder, train=False, download=True)
        for arm in s.arms:
            self.target_train(arm)
        _ = self.target_clean

    def _check_source(self) -> None:
        s = self.settings
        if s.source == "folder":
            if not self._source_folder.is_dir():
                raise StudyError(f"--source-data {self._source_folder} is not a folder", status=2)
            try:
                found = ImageFolder(str(self._source_folder))
            except FileNotFoundError as error:
                raise StudyError(f"--source-data {self._source_folder}: {error}", status=2) from None
            fewest = int(torch.bincount(torch.tensor(found.targets)).min())
            if fewest * len(found.classes) < s.pretrain.images:
                raise StudyError(
                    f"--source-data {self._source_folder} has a class of {fewest} images among {len(found.classes)}: "
                    f"too few for pretrain.images={s.pretrain.images}",
                    status=2,
                )
        elif s.source == "checkpoint":
            require_fit(self.source_weights(), s, str(self.paths.source_checkpoint))
        elif s.source == "imagenet":
            if s.model != "torchvision:resnet50" or s.stem != "imagenet":
                raise StudyError(
                    "ImageNet's weights are those of model=torchvision:resnet50 with stem=imagenet; give --source-data "
                    "or --source-checkpoint for another",
                    status=2,
                )
            cached = Path(torch.hub.get_dir()) / "checkpoints" / ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2]
            if not self.paths.download and not cached.exists():
                raise FileNotFoundError(f"no ImageNet weights in {cached.parent}")
            with _unless_new(cached.parent):
                imagenet_weights()


def _names_and_sizes(files: list[Path]) -> str:
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    return "names and sizes, sha256 " + hashlib.sha256(listing.encode()).hexdigest()


@contextmanager
def _unless_new(folder: Path) -> Iterator[None]:
    """Remove ``folder`` where the block creates it and then fails."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Set the default timeout of sockets to ``seconds`` within the block."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
