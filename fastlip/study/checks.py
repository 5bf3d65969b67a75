"""What a run's settings must satisfy, checked whenever they are made."""

import dataclasses
from typing import TYPE_CHECKING

from fastlip.study.errors import StudyError

if TYPE_CHECKING:
    from fastlip.study.config import Settings


def check(s: "Settings") -> None:
    """Raise :class:`StudyError` with status 2 where a setting is out of range; the message names it."""
    _check_choices(s)
    for name in ("pretrain", "scratch", "finetune"):
        _check_schedule(s, name)
    _check_measures(s)
    _check_rules(s)


def need(condition: bool, name: str, wanted: str) -> None:
    if not condition:
        raise StudyError(f"--set {name}: {wanted}", status=2)


def _check_choices(s: "Settings") -> None:
    from fastlip.study.config import ARMS

    need(bool(s.arms) and set(s.arms) <= set(ARMS), "arms", f"choose from {', '.join(ARMS)}")
    need(len(set(s.arms)) == len(s.arms), "arms", "name each arm once")
    need((s.dataset == "generated") == (s.source == "generated"), "source", "generated images go together")
    need(s.seeds > 0 and s.seed >= 0, "seeds", "seeds must be at least 1 and seed at least 0")
    need(s.threads >= 0, "threads", "must be at least 0")
    need(s.save_seconds >= 0, "save_seconds", "must be at least 0")


def _check_schedule(s: "Settings", name: str) -> None:
    schedule = getattr(s, name)
    for part in ("images", "epochs", "batch_size", "max_lr", "head_lr"):
        need(getattr(schedule, part) > 0, f"{name}.{part}", "must be above 0")
    need(schedule.batch_size > 1, f"{name}.batch_size", "must be at least 2")
    need(0 < schedule.warmup < 1, f"{name}.warmup", "must lie between 0 and 1")
    need(schedule.weight_decay >= 0 and schedule.crop >= 0, name, "weight_decay and crop must be at least 0")
    need(0 <= schedule.momentum < 1, f"{name}.momentum", "must lie in [0, 1)")
    need(0 <= schedule.label_smoothing < 1, f"{name}.label_smoothing", "must lie in [0, 1)")
    kept = schedule.snapshots
    need(len(set(kept)) == len(kept), f"{name}.snapshots", "name each epoch once")
    need(all(0 < e < schedule.epochs for e in kept), f"{name}.snapshots", f"epochs from 1 to {name}.epochs - 1")
    need(not kept or name != "pretrain", f"{name}.snapshots", "the source is not measured; leave it empty")


def _check_measures(s: "Settings") -> None:
    need(0 < s.evaluation.images <= s.evaluation.clean_images, "evaluation.images", "1 to evaluation.clean_images")
    need(s.evaluation.snapshot_images > 0, "evaluation.snapshot_images", "must be at least 1")
    need(s.evaluation.batch_size > 0, "evaluation.batch_size", "must be above 0")
    need(0 <= s.examples <= s.evaluation.images, "examples", "0 to evaluation.images")
    grids = {
        "gaussian.sigmas": s.gaussian.sigmas,
        "pgd.linf_255": s.pgd.linf_255,
        "pgd.l2": s.pgd.l2,
        "pgd.l1": s.pgd.l1,
        "strong.linf_255": s.strong.linf_255,
        "strong.l2": s.strong.l2,
    }
    for name, grid in grids.items():
        # Files are named by six digits of the strength.
        need(all(v > 0 for v in grid) and len({f"{v:g}" for v in grid}) == len(grid), name, "distinct values above 0")
    need(s.pgd.steps > 0 and s.pgd.restarts > 0 and s.pgd.relative_step > 0, "pgd", "its numbers must be above 0")
    for group in ("smallest", "smoothing"):
        for f in dataclasses.fields(getattr(s, group)):
            need(getattr(getattr(s, group), f.name) > 0, f"{group}.{f.name}", "must be above 0")
    need(s.smallest.levels > 1, "smallest.levels", "must be at least 2")
    for name in ("steps", "restarts", "targets", "queries"):
        need(getattr(s.strong, name) > 0, f"strong.{name}", "must be at least 1")
    need(0 < s.smoothing.alpha < 1, "smoothing.alpha", "must lie between 0 and 1")
    need(0 < s.lipschitz.eta < 1, "lipschitz.eta", "must lie between 0 and 1")
    need(s.lipschitz.jacobian_steps > 0, "lipschitz.jacobian_steps", "must be at least 1")
    need(s.lipschitz.jacobian_images > 0, "lipschitz.jacobian_images", "must be at least 1")
    need(s.features.images > 1, "features.images", "must be at least 2")
    need(s.corruptions.images > 0, "corruptions.images", "must be at least 1")
    kept = s.corruptions.severities
    need(bool(kept) and set(kept) <= {1, 2, 3, 4, 5}, "corruptions.severities", "from 1 to 5")
    need(len(set(kept)) == len(kept), "corruptions.severities", "name each once")


def _check_rules(s: "Settings") -> None:
    need(s.rules.compared_linf_255 in s.pgd.linf_255, "rules.compared_linf_255", "must be one of pgd.linf_255")
    for name in ("confidence", "ratio", "share", "no_correlation", "power"):
        need(0 < getattr(s.rules, name) < 1, f"rules.{name}", "must lie between 0 and 1")
    need(s.rules.min_seeds > 1, "rules.min_seeds", "must be at least 2")
    need(s.rules.min_runs > 2, "rules.min_runs", "must be at least 3")
    need(s.rules.resamples > 0, "rules.resamples", "must be at least 1")
