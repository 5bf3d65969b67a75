"""All settings of a run, in one frozen dataclass that checks itself."""

from dataclasses import dataclass, field, replace
from typing import Literal

from fastlip.study.settings import checks, normalization
from fastlip.study.settings.attacks import GaussianSettings, PgdSettings, SmallestSettings, StrongSuiteSettings
from fastlip.study.settings.checks import need
from fastlip.study.settings.measurements import (
    CorruptionSettings,
    EvaluationSettings,
    FeatureSettings,
    LipschitzSettings,
    SmoothingSettings,
    TransferSettings,
)
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.training import REFERENCES, TRANSFER, Role, Schedule

#: How far "matched" may be from as many images as the source and the fine-tuning together see, relative to them.
_MATCHED = 0.1


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's results, apart from the data and the machine.

    Attributes:
        preset: name of the preset that the settings were derived from.
        dataset: "generated", "cifar10", "cifar100", "svhn", "folder" (``--target FOLDER``) or "hf:NAME".
        source: what the transfer arms start from: "imagenet" (the published weights of ``model``), "checkpoint", or
            images as in ``dataset``, on which the study itself pre-trains.
        corrupted: "generated" by the study, or "cifar10c" for CIFAR-10-C's files.
        pretrain: how the source is trained.
        scratch: how the arms of the large network with random initial weights are trained; "matched" takes as many more
            epochs as the source and the fine-tuning together saw images.
        reference: how the small references are trained.
        finetune: how the transfer arms are trained; "lpft" follows it twice, for the head and then for all weights.
        norm_bounds: the bounds of the arm "constrained" on the operator norms of its layers, each with the BatchNorm
            behind it; the seeds take them in turn, so that the constants of its runs differ.
        evaluation: test images.
        arms: any of :data:`~fastlip.study.settings.training.ARMS`; empty where ``checkpoints`` are measured.
        checkpoints: names of the checkpoints that are measured without training; empty where the study trains.
        models: the network of each of ``checkpoints``, in the form of ``model``; empty where all have that one.
        normalize: by what the networks of ``checkpoints`` normalise their input: "cifar10", "cifar100", "svhn",
            "imagenet", "none", or R,G,B/R,G,B (means and standard deviations); the statistics of ``dataset`` where they
            are known, or else ImageNet's, if empty.
        image_size: height and width that the images of a folder or of "hf:NAME" are brought to; 32 for all others.
        model: the large network: "torchvision:NAME", "timm:NAME" or "package.module:function", whose function takes
            ``num_classes``.
        stem: how ``model`` begins, see :data:`fastlip.models.STEMS`.
        scale: factor by which images are enlarged inside the model, in front of its stem: 1, 2, 4 or 7.
        stages: names of the modules whose outputs are the feature maps; found from the module tree if empty.
        head: name of the module that gives the logits; found from the module tree if empty.
        weights: which published ImageNet weights the source "imagenet" takes, as torchvision or timm name them; their
            default if empty.
        sources: "one" source for all seeds, or "each" seed its own.
        seed: first seed.
        seeds: number of consecutive seeds.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "float32" or "bfloat16", of the matrix products in training; attacks and reported
            predictions are in float32. "auto" is bfloat16 where the machine's matrix products are faster in it; on a
            CPU a network with grouped convolutions is timed.
        compile: whether training compiles the network: "auto" (on a GPU), "on" or "off".
        threads: CPU threads; 0 takes as many as are free: the cores that this process may use, within the limits of its
            affinity, its control groups and OMP_NUM_THREADS.
        save_seconds: time between two saves of a training run in progress.
        examples: number of test images shown in the report.
        gaussian: noise at fixed strengths.
        pgd: PGD at fixed strengths.
        strong: the stronger suite.
        smallest: searches for the smallest perturbations.
        lipschitz: certified norms and Jacobian norms.
        features: spectra of feature maps.
        corruptions: common corruptions.
        transfer: transfer of adversarial examples between models.
        smoothing: randomised smoothing.
        rules: numbers in the rules of the verdicts.
    """

    preset: str
    dataset: str
    source: str
    pretrain: Schedule
    scratch: Schedule
    finetune: Schedule
    reference: Schedule
    evaluation: EvaluationSettings
    corrupted: Literal["generated", "cifar10c"] = "generated"
    norm_bounds: tuple[float, ...] = (1.5, 2.0, 1.25)
    arms: tuple[str, ...] = ("scratch", "finetune")
    checkpoints: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    normalize: str = ""
    image_size: int = 32
    model: str = "torchvision:resnet50"
    stem: str = "imagenet"
    scale: int = 1
    stages: tuple[str, ...] = ()
    head: str = ""
    weights: str = ""
    sources: Literal["one", "each"] = "one"
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
    transfer: TransferSettings = field(default_factory=TransferSettings)
    smoothing: SmoothingSettings = field(default_factory=SmoothingSettings)
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        """Raise :class:`StudyError` with status 2 where a setting is out of range or two do not fit each other."""
        checks.check_arms(self.arms, self.checkpoints)
        need(len(self.models) in (0, len(self.checkpoints)), "models", "one for each checkpoint, or none")
        need(not self.checkpoints or self.seeds == 1, "seeds", "checkpoints are measured once: leave it at 1")
        checks.check_images(self.dataset, self.source, self.image_size)
        normalization.statistics(self.normalize, self.dataset)
        need(
            not self.normalize or bool(self.checkpoints), "normalize", "is for checkpoints that are measured; leave it"
        )
        named = self.stages or self.head
        fits = not self.models or self.model in self.models
        need(not named or fits, "head", "stages and head are of one network: name one --model for all checkpoints")
        checks.check_model(self.stem, self.scale, self.weights, self.source)
        need((self.dataset == "generated") == (self.source == "generated"), "source", "generated images go together")
        need(self.seeds > 0, "seeds", "must be at least 1")
        need(self.seed >= 0, "seed", "must be at least 0")
        need(self.threads >= 0, "threads", "must be at least 0")
        need(self.save_seconds >= 0, "save_seconds", "must be at least 0")
        for name in ("pretrain", "scratch", "finetune", "reference"):
            checks.check_schedule(getattr(self, name), name)
            need(getattr(self, name).crop < self.image_size, f"{name}.crop", "must be below image_size")
        checks.check_norm_bounds(self.norm_bounds)
        if "matched" in self.arms and self.pretrains:
            epochs = self._seen / self.scratch.images
            near = abs(self.schedule("matched").epochs / epochs - 1) <= _MATCHED
            need(near, "arms", f"matched would take {epochs:.2g} epochs of scratch.images; make that a whole number")
        checks.check_evaluation(self.evaluation)
        need(0 <= self.examples <= self.evaluation.images, "examples", "0 to evaluation.images")
        checks.check_attacks(self.gaussian, self.pgd, self.strong, self.smallest)
        checks.check_measurements(self.lipschitz, self.features, self.corruptions, self.transfer, self.smoothing)
        compared = self.rules.compared_linf_255
        need(compared in self.pgd.linf_255, "rules.compared_linf_255", "must be one of pgd.linf_255")
        checks.check_rules(self.rules)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.seeds))

    def schedule(self, arm: str) -> Schedule:
        """How ``arm`` is trained."""
        if arm == "matched":
            return replace(self.scratch, epochs=max(1, round(self._seen / self.scratch.images)), snapshots=())
        if arm == "constrained":
            return replace(self.scratch, snapshots=())
        if arm in REFERENCES:
            return self.reference
        return self.finetune if arm in TRANSFER else self.scratch

    def norm_bound(self, arm: str, seed: int) -> float | None:
        """Below which the norms of the layers are kept in the training of ``arm`` with ``seed``; None for no bound."""
        return self.norm_bounds[(seed - self.seed) % len(self.norm_bounds)] if arm == "constrained" else None

    @property
    def _seen(self) -> int:
        """Training images that the source and the fine-tuning see together."""
        return self.pretrain.images * self.pretrain.epochs + self.finetune.images * self.finetune.epochs

    def training_images(self, arm: str) -> range:
        """Which images of the target ``arm`` is trained on: their places in an order that all arms share."""
        n = self.schedule(arm).images
        return range(n, 2 * n) if arm == "disjoint" else range(n)

    @property
    def transfers(self) -> bool:
        """Whether any arm starts from the source."""
        return any(arm in TRANSFER for arm in self.arms)

    @property
    def pretrains(self) -> bool:
        """Whether the run trains the source itself."""
        return self.transfers and self.source not in ("imagenet", "checkpoint")

    def architecture_of(self, arm: str) -> str:
        """The network of ``arm`` or of a checkpoint in the form of ``model``."""
        if arm in self.checkpoints:
            return self.models[self.checkpoints.index(arm)] if self.models else self.model
        if arm == "resnet18":
            return "torchvision:resnet18"
        return f"fastlip:{arm}" if arm in REFERENCES else self.model

    def role_of(self, arm: str) -> Role:
        """What ``arm`` is to the questions."""
        if arm in self.checkpoints:
            return "checkpoint"
        if arm in REFERENCES:
            return "reference"
        return "transfer" if arm in TRANSFER else "scratch"
