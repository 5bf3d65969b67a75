"""Presets, and how the command line overrides their settings."""

import dataclasses

from fastlip.study.errors import StudyError
from fastlip.study.settings.attacks import GaussianSettings, PgdSettings, StrongSuiteSettings
from fastlip.study.settings.measurements import (
    CorruptionSettings,
    EvaluationSettings,
    FeatureSettings,
    LipschitzSettings,
    SmoothingSettings,
)
from fastlip.study.settings.settings import Settings
from fastlip.study.settings.training import Schedule

_QUICK = Settings(
    preset="quick",
    dataset="cifar10",
    source="imagenet",
    pretrain=Schedule(images=20000, epochs=3, max_lr=0.1),
    scratch=Schedule(images=10000, epochs=4, max_lr=0.1, snapshots=(1, 2)),
    finetune=Schedule(images=10000, epochs=4, max_lr=0.05, snapshots=(1, 2)),
    reference=Schedule(images=10000, epochs=8, max_lr=0.05),
    evaluation=EvaluationSettings(images=200, clean_images=5000),
    arms=("softmax", "mlp", "convnet", "resnet18", "scratch", "finetune"),
    save_seconds=60.0,
    corruptions=CorruptionSettings(images=200),
)

PRESETS = {
    "demo": Settings(
        preset="demo",
        dataset="generated",
        source="generated",
        pretrain=Schedule(images=4000, epochs=2, max_lr=0.1, crop=0, flip=False),
        scratch=Schedule(images=2000, epochs=3, max_lr=0.1, crop=0, flip=False, snapshots=(1,)),
        finetune=Schedule(images=2000, epochs=3, max_lr=0.05, crop=0, flip=False, snapshots=(1,)),
        reference=Schedule(images=2000, epochs=3, max_lr=0.05, crop=0, flip=False),
        evaluation=EvaluationSettings(images=60, clean_images=480, snapshot_images=24),
        gaussian=GaussianSettings(sigmas=(0.05, 0.1, 0.2)),
        pgd=PgdSettings(linf_255=(0.5, 1.0, 2.0), l2=(0.25, 0.5), l1=(6.0,)),
        strong=StrongSuiteSettings(linf_255=(1.0,), l2=(), steps=10, targets=1, queries=50),
        lipschitz=LipschitzSettings(jacobian_images=8),
        features=FeatureSettings(images=60),
        corruptions=CorruptionSettings(severities=(1, 5), images=60),
        smoothing=SmoothingSettings(images=8, samples=96),
    ),
    "quick": _QUICK,
    # The training of "quick" over enough seeds for questions 3 and 4; only what the questions need is measured.
    "seeds": dataclasses.replace(
        _QUICK,
        preset="seeds",
        evaluation=EvaluationSettings(images=400, clean_images=5000, snapshot_images=100),
        seeds=6,
        pgd=PgdSettings(linf_255=(0.5, 1.0, 2.0), l2=(), l1=()),
        strong=StrongSuiteSettings(linf_255=(), l2=()),
        corruptions=CorruptionSettings(severities=(1, 3, 5)),
    ),
    "full": Settings(
        preset="full",
        dataset="cifar10",
        source="imagenet",
        pretrain=Schedule(images=20000, epochs=60, max_lr=0.1, batch_size=128),
        scratch=Schedule(images=50000, epochs=40, max_lr=0.1, batch_size=128, snapshots=(2, 5, 10, 20, 30)),
        finetune=Schedule(images=50000, epochs=15, max_lr=0.05, batch_size=128, snapshots=(1, 2, 4, 8, 12)),
        reference=Schedule(images=50000, epochs=40, max_lr=0.05, batch_size=128),
        evaluation=EvaluationSettings(images=1000, clean_images=10000, snapshot_images=200, batch_size=500),
        arms=("softmax", "mlp", "convnet", "resnet18", "scratch", "disjoint", "finetune", "linear", "partial", "lpft"),
        # Question 4 needs rules.min_runs training runs from scratch; snapshots of a run do not count as runs.
        seeds=6,
        strong=StrongSuiteSettings(linf_255=(0.5, 1.0, 2.0), l2=(0.1, 0.25), steps=100, targets=9, queries=1000),
        lipschitz=LipschitzSettings(jacobian_images=100, jacobian_steps=50),
        features=FeatureSettings(images=1000),
        corruptions=CorruptionSettings(images=1000),
        smoothing=SmoothingSettings(images=200, selection=100, samples=1000),
    ),
}


def preset(name: str) -> Settings:
    try:
        return PRESETS[name]
    except KeyError:
        raise StudyError(f"--preset {name} does not exist; choose {' or '.join(PRESETS)}", status=2) from None
