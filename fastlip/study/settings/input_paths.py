"""What the command line says about files, and what follows from it for the settings."""

from dataclasses import dataclass, replace
from pathlib import Path

from fastlip.study.errors import StudyError
from fastlip.study.settings.settings import Settings


@dataclass(frozen=True)
class InputPaths:
    """What the command line said about files.

    Attributes:
        data: folder that holds ``cifar-10-batches-py``.
        source_checkpoint: weights under torchvision's names, safetensors or a torch file (read without executing it).
        source_data: folder of images, one folder per class.
        corruptions: folder with the files of CIFAR-10-C.
        download: whether missing files may be fetched.
    """

    data: Path | None = None
    source_checkpoint: Path | None = None
    source_data: Path | None = None
    corruptions: Path | None = None
    download: bool = True


def resolve_source(settings: Settings, paths: InputPaths) -> Settings:
    """The settings with the source and corruptions that the given files ask for; ImageNet's weights for want of one."""
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
