"""All settings of a run, in one frozen dataclass that checks itself."""

from dataclasses import dataclass, field
from typing import Literal

from fastlip.study.settings import checks
from fastlip.study.settings.attacks import GaussianSettings, PgdSettings, SmallestSettings, StrongSuiteSettings
from fastlip.study.settings.checks import need
from fastlip.study.settings.measurements import (
    CorruptionSettings,
    EvaluationSettings,
    FeatureSettings,
    LipschitzSettings,
    SmoothingSettings,
)
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.training import TRANSFER, Schedule


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's results, apart from the data and the machine.

    Attributes:
        preset: name of the preset that the settings were derived from.
        dataset: "generated" or "cifar10".
        source: what the transfer arms start from; the study itself pre-trains on "generated" and "folder".
        corrupted: "generated" by the study, or "cifar10c" for CIFAR-10-C's files.
        pretrain: how the source is trained.
        scratch: how the arms with random initial weights are trained.
        finetune: how the transfer arms are trained; "lpft" follows it twice, for the head and then for all weights.
        evaluation: test images.
        arms: any of "scratch", "reference" (``reference_architecture`` from scratch), "finetune" (all weights),
            "linear" (the head), "partial" (the last stage and the head) and "lpft" (the head, then all weights).
        architecture: "resnet50" or "resnet18".
        reference_architecture: the small network that "bigger" is relative to.
        stem: "imagenet" (7x7 stride 2 and max-pool) or "cifar" (3x3).
        seed: first seed.
        seeds: number of consecutive seeds.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "float32" or "bfloat16", of the matrix products in training; attacks and reported
            predictions are in float32.
        compile: whether training compiles the network: "auto" (on a GPU), "on" or "off".
        threads: CPU threads; 0 takes torch's default.
        save_seconds: time between two saves of a training run in progress.
        examples: number of test images shown in the report.
        gaussian: noise at fixed strengths.
        pgd: PGD at fixed strengths.
        strong: the stronger suite.
        smallest: searches for the smallest perturbations.
        lipschitz: certified norms and Jacobian norms.
        features: spectra of feature maps.
        corruptions: common corruptions.
        smoothing: randomised smoothing.
        rules: numbers in the rules of the verdicts.
    """

    preset: str
    dataset: Literal["generated", "cifar10"]
    source: Literal["generated", "imagenet", "checkpoint", "folder"]
    pretrain: Schedule
    scratch: Schedule
    finetune: Schedule
    evaluation: EvaluationSettings
    corrupted: Literal["generated", "cifar10c"] = "generated"
    arms: tuple[str, ...] = ("scratch", "finetune")
    architecture: Literal["resnet50", "resnet18"] = "resnet50"
    reference_architecture: Literal["resnet50", "resnet18"] = "resnet18"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    seed: int = 0
    seeds: int = 1
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    threads: int = 0
    save_seconds: float = 30.0
    examples: int = 6
    gaussian: GaussianSettings = field(default_factory=GaussianSettings)
    pgd: PgdSettings = field(default_factory=PgdSettings)
    strong: StrongSuiteSettings = field(default_factory=StrongSuiteSettings)
    smallest: SmallestSettings = field(default_factory=SmallestSettings)
    lipschitz: LipschitzSettings = field(default_factory=LipschitzSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    corruptions: CorruptionSettings = field(default_factory=CorruptionSettings)
    smoothing: SmoothingSettings = field(default_factory=SmoothingSettings)
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        """Raise :class:`StudyError` with status 2 where a setting is out of range or two do not fit each other."""
        checks.check_arms(self.arms)
        need((self.dataset == "generated") == (self.source == "generated"), "source", "generated images go together")
        need(self.seeds > 0 and self.seed >= 0, "seeds", "seeds must be at least 1 and seed at least 0")
        need(self.threads >= 0, "threads", "must be at least 0")
        need(self.save_seconds >= 0, "save_seconds", "must be at least 0")
        for name in ("pretrain", "scratch", "finetune"):
            checks.check_schedule(getattr(self, name), name)
        checks.check_evaluation(self.evaluation)
        need(0 <= self.examples <= self.evaluation.images, "examples", "0 to evaluation.images")
        checks.check_attacks(self.gaussian, self.pgd, self.strong, self.smallest)
        checks.check_measurements(self.lipschitz, self.features, self.corruptions, self.smoothing)
        compared = self.rules.compared_linf_255
        need(compared in self.pgd.linf_255, "rules.compared_linf_255", "must be one of pgd.linf_255")
        checks.check_rules(self.rules)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.seeds))

    def schedule(self, arm: str) -> Schedule:
        return self.finetune if arm in TRANSFER else self.scratch

    @property
    def transfers(self) -> bool:
        """Whether any arm starts from the source."""
        return any(arm in TRANSFER for arm in self.arms)

    def architecture_of(self, arm: str) -> str:
        return self.reference_architecture if arm == "reference" else self.architecture
