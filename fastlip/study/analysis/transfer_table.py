"""Transfer of adversarial examples between the models of a run, as a cross table over all pairs of one seed."""

import numpy as np

from fastlip.study.analysis.statistics import proportion
from fastlip.study.settings.settings import Settings
from fastlip.study.settings.training import TRANSFER
from fastlip.study.storage.array_files import read_measured, read_transfer
from fastlip.study.storage.files import damaged
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.storage.schema import Transfer


def transfer_table(run: RunDirectory) -> list[Transfer]:
    """Every pair of models of one seed, a model with itself included, at every norm; empty where none was measured.

    Raises:
        StudyError: a file is missing, damaged or of another run.
    """
    s = run.settings
    if not s.transfer.l2:
        return []
    arms = {model.name: model.arm for model in run.models}
    right = {name: _right(run, name) for name in arms}
    found = []
    for model in run.models:
        target = model.name
        arrays = read_transfer(run.images(target, "transfer"))
        label = arrays["label"]
        _require_own(run, model, arrays, min(s.transfer.images, len(right[target])))
        for i, source in enumerate(arrays["source"].tolist()):
            both = (right[source] & right[target])[: len(label)]
            for j, strength in enumerate(arrays["strength"].tolist()):
                fooled, noise = (arrays[name][i, j] != label for name in ("prediction", "noise_prediction"))
                row = Transfer(
                    source=source,
                    target=target,
                    strength=strength,
                    disjoint=trained_on_disjoint_images(s, arms[source], arms[target]),
                    fooled=proportion(fooled[both], s.rules.confidence),
                    noise=proportion(noise[both], s.rules.confidence),
                )
                found.append(row)
    return found


def trained_on_disjoint_images(settings: Settings, a: str, b: str) -> bool:
    """Whether two arms are known to have been trained on images of which they share none.

    What a checkpoint or published weights were trained on is not known (some of torchvision's and timm's saw far more
    than ImageNet), and neither is whether a folder shares images with another data set.
    """
    if {a, b} & set(settings.checkpoints):
        return False
    starts = [arm for arm in (a, b) if arm in TRANSFER]
    if len(starts) == 2 or (starts and not {settings.source, settings.dataset} <= _SEPARATE):
        return False
    one, other = settings.training_images(a), settings.training_images(b)
    return one.stop <= other.start or other.stop <= one.start


#: Sources and targets of which no two share an image.
_SEPARATE = {"generated", "cifar10", "cifar100", "svhn"}


def _require_own(run: RunDirectory, model: TrainedModel, arrays: dict[str, np.ndarray], images: int) -> None:
    """Raise where a file is not about the models, norms and images of this run."""
    path = run.images(model.name, "transfer")
    if arrays["source"].tolist() != [other.name for other in run.models if other.seed == model.seed]:
        raise damaged(path, "its sources are not the models of this run")
    if arrays["strength"].tolist() != list(run.settings.transfer.l2) or len(arrays["label"]) != images:
        raise damaged(path, "its norms or images are not those of this run")


def _right(run: RunDirectory, name: str) -> np.ndarray:
    """Whether a model classifies each attacked image correctly as it is, [N] bool."""
    arrays = read_measured(run.images(name, "clean-attacked"))
    found: np.ndarray = arrays["prediction"] == arrays["label"]
    return found
