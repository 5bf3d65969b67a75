"""What each group of settings must satisfy on its own; :class:`~fastlip.study.settings.settings.Settings` asks for it.

Every function here raises :class:`StudyError` with status 2 where a setting is out of range; the message names it.
"""

import dataclasses
import difflib
import math
import re

from fastlip.models import SCALES, STEMS
from fastlip.study.errors import StudyError
from fastlip.study.settings.attacks import GaussianSettings, PgdSettings, SmallestSettings, StrongSuiteSettings
from fastlip.study.settings.measurements import (
    CorruptionSettings,
    EvaluationSettings,
    FeatureSettings,
    LipschitzSettings,
    SmoothingSettings,
    TransferSettings,
)
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.training import ARMS, Schedule

#: Data sets that torchvision reads from the folder ``--data``.
NAMED = ("cifar10", "cifar100", "svhn")
#: Settings that have an option of their own.
OWN_OPTIONS = ("seed",)


def need(condition: bool, name: str, wanted: str) -> None:
    """Raise where ``condition`` fails, which the setting ``name`` must satisfy; ``wanted`` says it in words."""
    if not condition:
        option = f"--{name}" if name in OWN_OPTIONS else f"--set {name}"
        raise StudyError(f"{option}: {wanted}", status=2)


def check_arms(arms: tuple[str, ...], checkpoints: tuple[str, ...]) -> None:
    need(bool(arms) != bool(checkpoints), "arms", "name arms to train, or measure checkpoints")
    need(set(arms) <= set(ARMS), "arms", f"choose from {', '.join(ARMS)}")
    need(len(set(arms)) == len(arms), "arms", "name each arm once")
    need(len({name.lower() for name in checkpoints}) == len(checkpoints), "checkpoints", "name each otherwise")
    fits = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name) for name in checkpoints)
    need(fits, "checkpoints", "names of up to 40 letters, digits, - and _")


def check_images(dataset: str, source: str, image_size: int) -> None:
    """Check what can be said before ``--target`` is known; :func:`check_image_size` goes on."""
    for name, value, others in (("dataset", dataset, ()), ("source", source, ("imagenet", "checkpoint"))):
        known = ("generated", *NAMED, "folder", *others)
        need(value in known or (len(value) > 3 and value.startswith("hf:")), name, f"{', '.join(known)} or hf:NAME")
    need(image_size > 7, "image_size", "must be at least 8")


def check_image_size(dataset: str, image_size: int) -> None:
    resized = dataset == "folder" or dataset.startswith("hf:")
    need(resized or image_size == 32, "image_size", f"{dataset} has images of 32x32; scale enlarges them in the model")


def check_model(stem: str, scale: int, weights: str, source: str) -> None:
    close = difflib.get_close_matches(stem, STEMS, n=1)
    need(stem in STEMS, "stem", f"choose from {', '.join(STEMS)}" + (f"; did you mean {close[0]}?" if close else ""))
    need(scale in SCALES, "scale", f"choose from {', '.join(map(str, SCALES))}")
    need(not weights or source == "imagenet", "weights", "names published ImageNet weights, which are not the source")


def check_schedule(schedule: Schedule, name: str) -> None:
    """``name`` is that of the schedule among the settings."""
    for part in ("images", "epochs", "batch_size", "max_lr", "head_lr"):
        need(getattr(schedule, part) > 0, f"{name}.{part}", "must be above 0")
    need(schedule.batch_size > 1, f"{name}.batch_size", "must be at least 2")
    need(0 < schedule.warmup < 1, f"{name}.warmup", "must lie between 0 and 1")
    need(schedule.weight_decay >= 0 and schedule.crop >= 0, name, "weight_decay and crop must be at least 0")
    need(0 <= schedule.momentum < 1, f"{name}.momentum", "must lie in [0, 1)")
    need(0 <= schedule.label_smoothing < 1, f"{name}.label_smoothing", "must lie in [0, 1)")
    need(schedule.cutout >= 0, f"{name}.cutout", "must be at least 0")
    need(0 <= schedule.averaging < 1, f"{name}.averaging", "must lie in [0, 1)")
    kept = schedule.snapshots
    need(len(set(kept)) == len(kept), f"{name}.snapshots", "name each epoch once")
    need(all(0 < e < schedule.epochs for e in kept), f"{name}.snapshots", f"epochs from 1 to {name}.epochs - 1")
    measured = name in ("scratch", "finetune")
    need(
        not kept or measured, f"{name}.snapshots", "those of the arms scratch and finetune are measured; leave it empty"
    )


def check_norm_bounds(bounds: tuple[float, ...]) -> None:
    need(bool(bounds) and all(0 < bound < math.inf for bound in bounds), "norm_bounds", "finite numbers above 0")
    need(len(set(bounds)) == len(bounds), "norm_bounds", "name each bound once")


def check_evaluation(evaluation: EvaluationSettings) -> None:
    most = evaluation.clean_images
    need(0 < evaluation.images <= most, "evaluation.images", f"1 to evaluation.clean_images, {most}")
    need(evaluation.snapshot_images > 0, "evaluation.snapshot_images", "must be at least 1")
    need(evaluation.batch_size > 0, "evaluation.batch_size", "must be above 0")


def check_attacks(
    gaussian: GaussianSettings, pgd: PgdSettings, strong: StrongSuiteSettings, smallest: SmallestSettings
) -> None:
    grids = {
        "gaussian.sigmas": gaussian.sigmas,
        "pgd.linf_255": pgd.linf_255,
        "pgd.l2": pgd.l2,
        "pgd.l1": pgd.l1,
        "strong.linf_255": strong.linf_255,
        "strong.l2": strong.l2,
    }
    for name, grid in grids.items():
        # Files are named by six digits of the strength.
        _distinct(grid, name)
    need(pgd.steps > 0 and pgd.restarts > 0 and pgd.relative_step > 0, "pgd", "its numbers must be above 0")
    for name in ("steps", "restarts", "targets", "queries"):
        need(getattr(strong, name) > 0, f"strong.{name}", "must be at least 1")
    _all_above_zero(smallest, "smallest")
    need(smallest.levels > 1, "smallest.levels", "must be at least 2")


def check_measurements(
    lipschitz: LipschitzSettings,
    features: FeatureSettings,
    corruptions: CorruptionSettings,
    transfer: TransferSettings,
    smoothing: SmoothingSettings,
) -> None:
    _all_above_zero(smoothing, "smoothing")
    need(0 < smoothing.alpha < 1, "smoothing.alpha", "must lie between 0 and 1")
    need(0 < lipschitz.eta < 1, "lipschitz.eta", "must lie between 0 and 1")
    need(lipschitz.jacobian_steps > 0, "lipschitz.jacobian_steps", "must be at least 1")
    need(lipschitz.jacobian_images > 0, "lipschitz.jacobian_images", "must be at least 1")
    need(features.images > 1, "features.images", "must be at least 2")
    need(corruptions.images > 0, "corruptions.images", "must be at least 1")
    kept = corruptions.severities
    need(bool(kept) and set(kept) <= {1, 2, 3, 4, 5}, "corruptions.severities", "from 1 to 5")
    need(len(set(kept)) == len(kept), "corruptions.severities", "name each once")
    need(transfer.images > 0, "transfer.images", "must be at least 1")
    _distinct(transfer.l2, "transfer.l2")


def check_rules(rules: Rules) -> None:
    for name in ("confidence", "nonlinear_gain", "accuracy_margin", "correlation", "power", "least_power"):
        need(0 < getattr(rules, name) < 1, f"rules.{name}", "must lie between 0 and 1")
    for name in ("ratio_margin", "distortion_margin"):
        need(1 < getattr(rules, name) < math.inf, f"rules.{name}", "must be above 1")
    need(rules.min_seeds > 1, "rules.min_seeds", "must be at least 2")
    need(rules.min_runs > 3, "rules.min_runs", "must be at least 4")
    need(rules.resamples > 0, "rules.resamples", "must be at least 1")


def _distinct(grid: tuple[float, ...], name: str) -> None:
    need(all(v > 0 for v in grid) and len({f"{v:g}" for v in grid}) == len(grid), name, "distinct values above 0")


def _all_above_zero(group: SmallestSettings | SmoothingSettings, name: str) -> None:
    for f in dataclasses.fields(group):
        need(getattr(group, f.name) > 0, f"{name}.{f.name}", "must be above 0")
