"""Source weights from a file given on the command line."""

from pathlib import Path

import torch
from torch import Tensor

from fastlip.models import load_backbone, load_checkpoint
from fastlip.study.errors import StudyError, first_line
from fastlip.study.settings.settings import Settings
from fastlip.study.training.architectures import build


def read_source_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or torch file; no code in it is executed.

    Raises:
        StudyError: it cannot be read or holds no state dict.
    """
    if not path.is_file():
        raise StudyError(f"--source-checkpoint {path} is not a file", status=2)
    try:
        if path.suffix == ".safetensors":
            return load_checkpoint(path)[0]
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StudyError(
            f"--source-checkpoint {path} cannot be read; it must be safetensors or a torch file of tensors alone "
            f"({first_line(error)})",
            status=2,
        ) from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    if not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise StudyError(f"--source-checkpoint {path} holds no state dict", status=2)
    return found


def require_fit(state: dict[str, Tensor], settings: Settings, name: str) -> None:
    """Raise :class:`StudyError` where the state dict of the file ``name`` is not one of the run's architecture."""
    try:
        load_backbone(build(settings.model, 2, settings.stem, 0), state)
    except ValueError as error:
        raise StudyError(f"--source-checkpoint {name}: {error}", status=2) from None
