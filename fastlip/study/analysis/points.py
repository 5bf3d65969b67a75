"""The data points of question 4: unstability and distortion of models and snapshots on fixed images."""

import math
from typing import NamedTuple

import numpy as np

from fastlip.study.analysis.statistics import number, proportion, split_half_reliability
from fastlip.study.analysis.summaries import StoredModel, largest
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel, pgd_name
from fastlip.study.storage.schema import Lipschitz, Point


def points(run: RunDirectory) -> list[Point]:
    """All points, by seed, arm and epoch.

    The final models of an arm are compared with each other where there are ``rules.min_runs`` of them, and with their
    snapshots otherwise.
    """
    s = run.settings
    found: dict[TrainedModel, Point] = {}
    for arm in dict.fromkeys(model.arm for model in run.models):
        finals, snapshots = ([m for m in models if m.arm == arm] for models in (run.models, run.snapshots))
        first = s.evaluation.snapshot_images if snapshots else s.evaluation.images
        if len(finals) >= s.rules.min_runs:
            found |= _together(run, finals, s.evaluation.images) | _together(run, snapshots, first)
        else:
            found |= _together(run, finals + snapshots, first)
    return [found[model] for model in sorted(found, key=_moment)]


def _moment(model: TrainedModel) -> tuple[int, str, float]:
    return model.seed, model.arm, math.inf if model.epoch is None else model.epoch


class _Measured(NamedTuple):
    right: np.ndarray  # [N] bool
    log10: np.ndarray  # [N], of the smallest distortion
    stretch: np.ndarray  # [N], under PGD at one radius
    margin: np.ndarray  # [N]


def _together(run: RunDirectory, models: list[TrainedModel], first: int) -> dict[TrainedModel, Point]:
    """Points of models that are compared with each other, on those of the first images that all classify correctly."""
    if not models:
        return {}
    measured = {model: _measured(run, model, first) for model in models}
    common = np.logical_and.reduce([m.right for m in measured.values()])
    reliability = {
        epoch: split_half_reliability(
            np.array([m.log10[common] for model, m in measured.items() if model.epoch == epoch])
        )
        for epoch in {model.epoch for model in models}
    }
    found = {}
    for model, m in measured.items():
        upper = read(run.lipschitz(model.name), Lipschitz)["log10_upper"]
        stretch = largest(m.stretch[common])
        # Correctly classified images have margins above 0, or at it where two logits are equal.
        margin = (
            float(np.log10(np.median(m.margin[common]))) if common.any() and np.median(m.margin[common]) > 0 else None
        )
        found[model] = Point(
            run=model.run_name,
            arm=model.arm,
            seed=model.seed,
            epoch=model.epoch,
            accuracy=proportion(m.right, run.settings.rules.confidence),
            log10_distortion=number(m.log10[common].mean()) if common.any() else None,
            reliability=reliability[model.epoch],
            log10_constant=None if margin is None else upper - margin,
            log10_stretch=None if margin is None or not stretch else math.log10(stretch) - margin,
            log10_upper=upper,
        )
    return found


def _measured(run: RunDirectory, model: TrainedModel, first: int) -> _Measured:
    stored = StoredModel(run, model)
    smallest = stored.images("smallest-pgd")
    # At the smallest adversarial perturbation the logits move by about the margin, whatever the network: the stretch
    # there over the margin is the reciprocal of the distortion. Under PGD of one radius it is not.
    attacked = stored.images(pgd_name("linf", run.settings.rules.compared_linf_255))
    with np.errstate(divide="ignore"):  # images that are wrong to begin with have no distortion; they are not used
        log10 = np.log10(np.minimum(smallest["distortion"], smallest["ceiling"]))
    return _Measured(
        right=stored.right[:first],
        log10=log10[:first],
        stretch=attacked["stretch"][:first],
        margin=stored.images("clean-attacked")["margin"][:first],
    )
