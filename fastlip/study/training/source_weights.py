"""The weights that transfer arms start from, where the study does not train them: published ones, or a file's."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from fastlip.models import imagenet_weights, load_backbone, published_weights
from fastlip.study.errors import StudyError, first_line
from fastlip.study.settings.settings import Settings
from fastlip.study.training.architectures import SOURCE, build, parts
from fastlip.study.training.given_checkpoints import read_state_dict

T = TypeVar("T")


def read_source_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or torch file; no code in it is executed.

    Raises:
        StudyError: it cannot be read or holds no state dict.
    """
    return read_state_dict(path, f"--source-checkpoint {path}")


def require_fit(state: dict[str, Tensor], settings: Settings, name: str) -> None:
    """Raise :class:`StudyError` where the state dict ``name`` is not one of the run's architecture."""
    network = build(settings, SOURCE, 2, 0)
    try:
        load_backbone(network, state, parts(settings, SOURCE, network).head)
    except ValueError as error:
        raise StudyError(f"{name}: {error} (--model {settings.model}, --set stem={settings.stem})", status=2) from None


def imagenet_name(settings: Settings) -> str:
    """The published weights that the settings name, as their library calls them.

    Raises:
        StudyError: there are no such weights.
    """
    return _asked(settings, lambda: published_weights(settings.model, settings.weights)[0])


def read_imagenet_weights(settings: Settings, download: bool) -> dict[str, Tensor]:
    """The published weights that the settings name.

    Raises:
        FileNotFoundError: they are not in the cache and not to be downloaded.
        OSError: they cannot be downloaded.
        StudyError: there are no such weights.
    """
    name, cached = _asked(settings, lambda: published_weights(settings.model, settings.weights))
    if not download and not cached:
        raise FileNotFoundError(f"no ImageNet weights {name} in the cache")
    size = settings.scale * settings.image_size
    return _asked(settings, lambda: imagenet_weights(model=settings.model, weights=settings.weights, image_size=size))


def _asked(settings: Settings, question: Callable[[], T]) -> T:
    try:
        return question()
    except (ValueError, ImportError) as error:
        raise StudyError(f"--set weights={settings.weights}: {first_line(error)}", status=2) from None
