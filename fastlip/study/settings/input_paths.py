"""The input files named on the command line, and the settings that follow from them."""

from dataclasses import dataclass, replace
from pathlib import Path

from fastlip.study.errors import StudyError
from fastlip.study.settings.settings import Settings


@dataclass(frozen=True)
class InputPaths:
    """The input files and folders named on the command line.

    Attributes:
        data: folder that holds ``cifar-10-batches-py``.
        source_checkpoint: weights under torchvision's names, in safetensors or a torch file (its code is not executed).
        source_data: folder of images, one folder per class.
        corruptions: folder with the files of CIFAR-10-C.
        download: whether missing files may be downloaded.
    """

    data: Path | None = None
    source_checkpoint: Path | None = None
    source_data: Path | None = None
    corruptions: Path | None = None
    download: bool = True


def resolve_source(settings: Settings, paths: InputPaths) -> Settings:
    """``settings`` with the source and corruptions that ``paths`` name; the default source is ImageNet's weights.

    Raises:
        StudyError: files are given for a preset that generates its images.
    """
    if settings.dataset == "generated":
        if paths.source_checkpoint or paths.source_data or paths.data or paths.corruptions:
            raise StudyError(
                f"--preset {settings.preset} generates its images: leave out --data, --source-checkpoint, "
                "--source-data and --corruptions, or use --preset quick",
                status=2,
            )
        return settings
    if paths.corruptions:
        settings = replace(settings, corrupted="cifar10c")
    if paths.source_checkpoint:
        return replace(settings, source="checkpoint")
    if paths.source_data:
        return replace(settings, source="folder")
    return settings
