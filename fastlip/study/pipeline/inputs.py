"""The images and source weights of a run, all checked before anything is written."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlip.data import ImageSet, cifar10_c, generated
from fastlip.study.errors import StudyError, first_line
from fastlip.study.pipeline.image_sets import GivenImages, unless_new
from fastlip.study.pipeline.stage import derived_seed
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.settings.measurements import GENERATED_CORRUPTIONS
from fastlip.study.settings.settings import Settings
from fastlip.study.training.architectures import check_networks
from fastlip.study.training.given_checkpoints import given_network
from fastlip.study.training.source_weights import (
    imagenet_name,
    read_imagenet_weights,
    read_source_weights,
    require_fit,
)

_SOURCE_REMEDY = "give --source-checkpoint FILE with the source's weights or --source-data IMAGES to pre-train on"


class Inputs:
    """The images and source weights of a run; each is loaded on first use."""

    def __init__(self, settings: Settings, paths: InputPaths) -> None:
        self.settings = settings
        self.paths = paths
        self._normalization: dict[str, str] = {}
        #: What the run warns of before it begins, a line for each.
        self.cautions: list[str] = []

    def require_available(self, begun: bool = False) -> None:
        """Raise :class:`StudyError` with status 2 where an input is missing or does not fit the settings.

        Nothing is written but downloads.

        Args:
            begun: whether the run was begun earlier, which was not without all images and checkpoints; its fingerprints
                say whether they are the same still.
        """
        self._check_arms()
        wanting: list[str] = []
        remedies: list[str | None] = []
        checks: list[tuple[Callable[[], None], str | None]] = [
            (partial(self._check_target, begun), self._target.remedy if self._target else None)
        ]
        if self.settings.transfers:
            given = self._source.remedy if self._source else None
            checks.append((partial(self._check_source, begun), given or _SOURCE_REMEDY))
        if self.settings.corrupted == "cifar10c":
            checks.append((self._check_corruptions, None))
        checks.append((self._check_checkpoints, None))
        for look, remedy in checks:
            try:
                look()
            except OSError as error:
                wanting.append(first_line(error))
                remedies.append(remedy)
            except ValueError as error:
                raise StudyError(str(error), status=2) from None
        if wanting:
            ways = " and ".join(dict.fromkeys(filter(None, remedies)))
            raise StudyError("; ".join(wanting) + (f": {ways}" if ways else ""), status=2)
        if not begun:
            self.cautions = check_networks(
                self.settings, self.settings.checkpoints or self.settings.arms, len(self.target_attacked.classes)
            )

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each input, which changes with its contents."""
        s = self.settings
        prints = {"target": self._target.fingerprint() if self._target else "fastlip.data.generated"}
        if s.corrupted == "cifar10c":
            prints["corruptions"] = _names_and_sizes(self._corruption_files)
        for name in s.checkpoints:
            prints[name] = f"{_sha256(self.paths.checkpoints[name])}, {self._normalized(name)}"
        if not s.transfers:
            return prints
        if s.source == "checkpoint":
            assert self.paths.source_checkpoint is not None
            prints["source"] = _sha256(self.paths.source_checkpoint)
        elif self._source:
            prints["source"] = self._source.fingerprint()
        else:
            prints["source"] = imagenet_name(s) if s.source == "imagenet" else prints["target"]
        return prints

    @property
    def source_name(self) -> str:
        """The source of the transfer arms, in words for the report."""
        s = self.settings
        if s.source == "generated":
            return f"pre-training on {s.pretrain.images} generated images"
        if self._source:
            return f"pre-training on {s.pretrain.images} images of {self._source.title}"
        if s.source == "imagenet":
            return f"published ImageNet weights ({imagenet_name(s)})"
        return "a checkpoint given on the command line"

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
        assert self._source is not None
        return self._source.images(None, n)

    def target_train(self, arm: str) -> ImageSet:
        """The training images of an arm."""
        places = self.settings.training_images(arm)
        if self._target is None:
            # Images are drawn as they are asked for: other ones need another seed.
            seed = derived_seed(self.settings.seed, "disjoint") if places.start else self.settings.seed
            return generated("target", "train", len(places), seed)
        return self._target.images("train", len(places), places.start)

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
            return read_imagenet_weights(self.settings, self.paths.download)
        assert self.paths.source_checkpoint is not None
        return read_source_weights(self.paths.source_checkpoint)

    def given_network(self, name: str) -> tuple[nn.Sequential, str]:
        """The network of a checkpoint that is measured without training, and its normalisation in words."""
        return given_network(self.settings, name, self.paths.checkpoints[name], len(self.target_attacked.classes))

    def _normalized(self, name: str) -> str:
        """The normalisation of a checkpoint in words."""
        if name not in self._normalization:
            self._normalization[name] = self.given_network(name)[1]
        return self._normalization[name]

    def _target_test(self, n: int) -> ImageSet:
        if self._target is None:
            return generated("target", "test", self.settings.evaluation.clean_images, self.settings.seed).balanced(n)
        return self._target.images("test", n)

    @cached_property
    def _target(self) -> GivenImages | None:
        """The target's images; None where they are generated."""
        s = self.settings
        if s.dataset == "generated":
            return None
        return GivenImages(
            self.paths.target or s.dataset, self.paths.data, s.image_size, ("train", "test") if s.arms else ("test",)
        )

    @cached_property
    def _source(self) -> GivenImages | None:
        """The images that the source is pre-trained on; None where there are none, or they are generated."""
        s = self.settings
        if not s.pretrains or s.source == "generated":
            return None
        return GivenImages(self.paths.source_data or s.source, self.paths.data, s.image_size, (None,))

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
            assert self._target is not None
            clean = self._target.whole_test
            found = cifar10_c(self._corruption_folder, name, 1, clean.classes)
            if not torch.equal(found.labels, clean.labels):
                raise ValueError(f"--corruptions {self._corruption_folder}: labels.npy is not in CIFAR-10's order")

    def _check_target(self, begun: bool) -> None:
        s = self.settings
        if self._target is None:
            return
        self._target.fetch(self.paths.download)
        for arm in () if begun else s.arms:
            besides = " that scratch has not" if arm == "disjoint" else ""
            with _setting(f"{arm} has {s.schedule(arm).images} training images{besides}"):
                self.target_train(arm)
        with _setting(f"evaluation.clean_images={s.evaluation.clean_images}"):
            _ = self.target_clean

    def _check_checkpoints(self) -> None:
        for name in self.settings.checkpoints:
            self._normalized(name)

    def _check_source(self, begun: bool) -> None:
        s = self.settings
        if self._source is not None:
            self._source.fetch(self.paths.download)
            if not begun:
                with _setting(f"--source-data {self.paths.source_data}: pretrain.images={s.pretrain.images}"):
                    _ = self.source_train
        elif s.source == "checkpoint":
            require_fit(self.source_weights(), s, f"--source-checkpoint {self.paths.source_checkpoint}")
        elif s.source == "imagenet":
            with unless_new(Path(torch.hub.get_dir()) / "checkpoints"):
                require_fit(self.source_weights(), s, imagenet_name(s))


@contextmanager
def _setting(wanted: str) -> Iterator[None]:
    """Say in the error about images what asked for them."""
    try:
        yield
    except (StudyError, FileNotFoundError) as error:
        raise StudyError(f"{wanted}: {error}", status=2) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256 " + hashlib.file_digest(file, "sha256").hexdigest()


def _names_and_sizes(files: list[Path]) -> str:
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    return "names and sizes, sha256 " + hashlib.sha256(listing.encode()).hexdigest()
