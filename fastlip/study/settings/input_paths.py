"""What the command line says about files, and what follows from it for the settings."""

from dataclasses import dataclass, replace
from pathlib import Path

from fastlip.study.errors import StudyError
from fastlip.study.settings.settings import Settings


@dataclass(frozen=True)
class Places:
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


def resolve_source(settings: Settings, places: Places) -> Settings:
    """The settings with the source and corruptions that the given files ask for; ImageNet's weights for want of one."""
    if settings.dataset == "generated":
        if places.source_checkpoint or places.source_data or places.data or places.corruptions:
            raise StudyError(
                f"--preset {settings.preset} generates its images: leave out --data, --source-checkpoint, "
                "--source-data and --corruptions, or use --preset quick",
                status=2,
            )
        return settings
    if places.corruptions:
        settings = replace(settings, corrupted="cifar10c")
    if places.source_checkpoint:
        return replace(settings, source="checkpoint")
    if places.source_data:
        return replace(settings, source="folder")
    return settings
