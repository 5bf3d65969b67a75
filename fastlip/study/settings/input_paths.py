"""The input files named on the command line, and the settings that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastlip.study.errors import StudyError
from fastlip.study.settings.checks import NAMED, check_image_size
from fastlip.study.settings.settings import Settings

_HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class InputPaths:
    """The inputs named on the command line.

    Attributes:
        data: folder that holds the files of CIFAR-10, CIFAR-100 and SVHN.
        source_checkpoint: weights under the network's own names, in safetensors or a torch file (its code is not
            executed).
        source_data: images to pre-train the source on, named as ``target`` is.
        corruptions: folder with the files of CIFAR-10-C.
        download: whether missing files may be downloaded.
        target: "cifar10", "cifar100", "svhn", a folder of images, or "hf:NAME" with a data set of the Hugging Face Hub
            or the folder of one; the preset's images if None.
        checkpoints: files of the checkpoints that are measured without training, by name.
    """

    data: Path | None = None
    source_checkpoint: Path | None = None
    source_data: str | Path | None = None
    corruptions: Path | None = None
    download: bool = True
    target: str | Path | None = None
    checkpoints: Mapping[str, Path] = field(default_factory=dict)


def resolve_source(settings: Settings, paths: InputPaths) -> Settings:
    """``settings`` with the images, source and corruptions that ``paths`` name; the default source is ImageNet's.

    Raises:
        StudyError: files are given for a preset that generates its images, or two of them do not go together.
    """
    if paths.target is not None and settings.dataset != "generated":
        settings = replace(settings, dataset=dataset_of(paths.target, "--target"))
    check_image_size(settings.dataset, settings.image_size)
    if settings.dataset == "generated":
        if paths.source_checkpoint or paths.source_data or paths.data or paths.corruptions or paths.target:
            raise StudyError(
                f"--preset {settings.preset} generates its images: leave out --data, --target, --source-checkpoint, "
                "--source-data and --corruptions, or use --preset quick",
                status=2,
            )
        return settings
    if paths.corruptions:
        if settings.dataset != "cifar10":
            raise StudyError("--corruptions holds CIFAR-10-C's files, which are for --target cifar10", status=2)
        settings = replace(settings, corrupted="cifar10c")
    if paths.source_checkpoint:
        return replace(settings, source="checkpoint")
    if paths.source_data is not None:
        source = dataset_of(paths.source_data, "--source-data")
        if _place(paths.source_data) == _place(paths.target or settings.dataset):
            raise StudyError("--source-data and --target are the same images; pre-train on others", status=2)
        return replace(settings, source=source)
    return settings


def dataset_of(given: str | Path, option: str) -> str:
    """The setting ``dataset`` for the images ``given``; a name goes before a folder of that name.

    Raises:
        StudyError: it is neither a name nor a folder.
    """
    text = str(given)
    if text in NAMED:
        return text
    if text.startswith(_HUGGING_FACE) and len(text) > len(_HUGGING_FACE):
        folder = Path(hugging_face_name(text))
        return _HUGGING_FACE + (folder.resolve().name if folder.is_dir() else str(folder))
    if not Path(text).is_dir():
        raise StudyError(f"{option} {text} is not a folder, nor {', '.join(NAMED)} or hf:NAME", status=2)
    return "folder"


def hugging_face_name(given: str | Path) -> str:
    """What follows "hf:"."""
    return str(given).removeprefix(_HUGGING_FACE)


def absolute(given: str | Path) -> str:
    """``given`` with the path of a folder or file made absolute; names stay as they are."""
    text = str(given)
    if text in NAMED:
        return text
    path = Path(hugging_face_name(text))
    if text.startswith(_HUGGING_FACE):
        return _HUGGING_FACE + str(path.resolve() if path.is_dir() else path)
    return str(path.resolve())


def _place(given: str | Path) -> str | Path:
    text = hugging_face_name(given)
    return Path(text).resolve() if Path(text).is_dir() and text not in NAMED else text
