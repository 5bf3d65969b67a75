"""The settings of a run: frozen dataclasses, presets of them, and overrides by dotted name."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastlip.study.errors import StudyError

#: Arms that start from the source: all weights, the head alone, the last stage and the head, the head and then all.
TRANSFER = ("finetune", "linear", "partial", "lpft")
ARMS = ("reference", "scratch", *TRANSFER)
SOURCES = ("generated", "imagenet", "checkpoint", "folder")


@dataclass(frozen=True)
class Schedule:
    """One training run: SGD with Nesterov momentum, the learning rate by ``OneCycleLR``.

    Attributes:
        images: training images, the same number of each class.
        epochs: passes over them.
        batch_size: images per step.
        max_lr: peak of the learning rate.
        head_lr: learning rate of the last layer over that of the others.
        warmup: share of the steps before the peak.
        momentum: Nesterov momentum.
        weight_decay: applied to weights, not to biases and BatchNorm.
        label_smoothing: share of the target spread over all classes.
        crop: images are shifted by up to this many pixels, mirrored at the border.
        flip: whether images are mirrored left to right half of the time.
    """

    images: int
    epochs: int
    max_lr: float
    head_lr: float = 1 / 32
    batch_size: int = 64
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop: int = 3
    flip: bool = True


@dataclass(frozen=True)
class Evaluation:
    """The test images that everything is measured on.

    Attributes:
        images: attacked test images, the same number of each class, fixed by their order in the test set.
        clean_images: test images for clean accuracy alone; the attacked ones are the first of them.
        batch_size: images per forward pass.
    """

    images: int
    clean_images: int
    batch_size: int = 100


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise at fixed strengths; ``sigmas`` are standard deviations of pixels in [0, 1]."""

    sigmas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Pgd:
    """PGD at fixed strengths.

    Attributes:
        linf_255: radii of the Linf ball in 255ths of the pixel range.
        l2: radii of the L2 ball, pixels in [0, 1].
        steps: gradient steps.
        relative_step: step size times ``steps`` over the radius.
        loss: "dlr" or "ce".
        restarts: runs from other random starts; the strongest counts.
    """

    linf_255: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    l2: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    steps: int = 10
    relative_step: float = 2.5
    loss: Literal["dlr", "ce"] = "dlr"
    restarts: int = 1

    @property
    def grid(self) -> list[tuple[Literal["linf", "l2"], float, float]]:
        """Norm, strength as written above, and radius in units of pixels in [0, 1]."""
        linf: list[tuple[Literal["linf", "l2"], float, float]] = [("linf", v, v / 255) for v in self.linf_255]
        return linf + [("l2", v, v) for v in self.l2]


@dataclass(frozen=True)
class Smallest:
    """Search for the smallest perturbation that changes the decision, per image, in L2.

    Attributes:
        steps: gradient steps of PGD at each radius.
        searches: radii tried.
        directions: Gaussian directions drawn per image.
        max_sigma: largest noise level tried.
        levels: noise levels tried before halving.
        halvings: bisections of the noise level after the first success.
    """

    steps: int = 10
    searches: int = 8
    directions: int = 4
    max_sigma: float = 4.0
    levels: int = 11
    halvings: int = 5


@dataclass(frozen=True)
class Lipschitz:
    """Certified norms.

    Attributes:
        eta: probability, over all random starts of one model, that any stated upper bound fails.
    """

    eta: float = 1e-6


@dataclass(frozen=True)
class Rules:
    """Numbers in the rules that turn statistics into verdicts; fixed before any result exists.

    Attributes:
        confidence: of the intervals of single rates and means.
        ratio: questions 1 and 2: smallest adversarial over smallest Gaussian distortion counts up to this ratio.
        share: questions 1 and 2: the lower limit of the share of images below the ratio must exceed this.
        compared_linf_255: question 3: Linf radius at which accuracies under PGD are compared.
        min_seeds: question 3: seeds below which nothing is said.
        min_models: question 4: trained models below which nothing is said.
        comparisons: comparisons declared in questions 3 and 4; each interval has confidence 1 - (1 - c)/comparisons.
        resamples: bootstrap resamples.
    """

    confidence: float = 0.95
    ratio: float = 0.1
    share: float = 0.9
    compared_linf_255: float = 1.0
    min_seeds: int = 3
    min_models: int = 6
    comparisons: int = 4
    resamples: int = 4000


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's results, apart from the data and the machine.

    Attributes:
        preset: name of the preset that this started from.
        dataset: "generated" or "cifar10".
        source: what the transfer arms start from: "generated" and "folder" are pre-trained on by the study itself.
        pretrain: how the source is trained.
        scratch: how the arms that start from nothing are trained.
        finetune: how the transfer arms are trained; "lpft" runs it twice, on the head and then on all weights.
        evaluation: test images.
        arms: any of "scratch", "reference" (``reference_architecture`` from scratch), "finetune" (all weights),
            "linear" (the head), "partial" (the last stage and the head) and "lpft" (the head, then all weights).
        architecture: "resnet50" or "resnet18".
        reference_architecture: the small network that says what "bigger" is compared with.
        stem: "imagenet" (7x7 stride 2 and max-pool) or "cifar" (3x3).
        seed: first seed.
        seeds: number of seeds; seed, seed + 1, ...
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "float32" or "bfloat16" for the matrix work of training and of the attacks' gradients;
            every reported prediction is float32.
        threads: CPU threads; 0 takes torch's default.
        save_seconds: a training run in progress is saved this often.
        examples: test images shown in the report.
        gaussian: noise at fixed strengths.
        pgd: PGD at fixed strengths.
        smallest: searches for the smallest perturbations.
        lipschitz: certified norms.
        rules: numbers in the rules of the verdicts.
    """

    preset: str
    dataset: Literal["generated", "cifar10"]
    source: Literal["generated", "imagenet", "checkpoint", "folder"]
    pretrain: Schedule
    scratch: Schedule
    finetune: Schedule
    evaluation: Evaluation
    arms: tuple[str, ...] = ("scratch", "finetune")
    architecture: Literal["resnet50", "resnet18"] = "resnet50"
    reference_architecture: Literal["resnet50", "resnet18"] = "resnet18"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    seed: int = 0
    seeds: int = 1
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    save_seconds: float = 30.0
    examples: int = 6
    gaussian: Gaussian = field(default_factory=Gaussian)
    pgd: Pgd = field(default_factory=Pgd)
    smallest: Smallest = field(default_factory=Smallest)
    lipschitz: Lipschitz = field(default_factory=Lipschitz)
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        _check(self)

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


def names(settings: Settings) -> dict[str, Any]:
    """Every setting's dotted name with its value."""

    def walk(value: Any, prefix: str) -> typing.Iterator[tuple[str, Any]]:
        for f in dataclasses.fields(value):
            inner = getattr(value, f.name)
            if dataclasses.is_dataclass(inner):
                yield from walk(inner, f"{prefix}{f.name}.")
            else:
                yield prefix + f.name, inner

    return dict(walk(settings, ""))


def to_json(settings: Settings) -> dict[str, Any]:
    """Plain lists, dicts and numbers, as in config.json."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def from_json(plain: dict[str, Any]) -> Settings:
    """The settings that :func:`to_json` wrote."""
    settings: Settings = _build(Settings, plain)
    return settings


def _build(kind: Any, plain: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    if set(plain) != set(hints):
        raise StudyError(f"the run was made by another version of fastlip: {sorted(set(plain) ^ set(hints))} differ")
    values = {}
    for name, value in plain.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return kind(**values)


def _check(s: Settings) -> None:
    def need(condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise StudyError(f"--set {name}: {wanted}", status=2)

    need(bool(s.arms) and set(s.arms) <= set(ARMS), "arms", f"choose from {', '.join(ARMS)}")
    need(len(set(s.arms)) == len(s.arms), "arms", "name each arm once")
    need((s.dataset == "generated") == (s.source == "generated"), "source", "generated images go together")
    for name in ("pretrain", "scratch", "finetune"):
        schedule = getattr(s, name)
        for part in ("images", "epochs", "batch_size", "max_lr", "head_lr"):
            need(getattr(schedule, part) > 0, f"{name}.{part}", "must be above 0")
        need(schedule.batch_size > 1, f"{name}.batch_size", "must be at least 2")
        need(0 < schedule.warmup < 1, f"{name}.warmup", "must lie between 0 and 1")
        need(schedule.weight_decay >= 0 and schedule.crop >= 0, name, "weight_decay and crop must be at least 0")
        need(0 <= schedule.momentum < 1, f"{name}.momentum", "must lie in [0, 1)")
        need(0 <= schedule.label_smoothing < 1, f"{name}.label_smoothing", "must lie in [0, 1)")
    need(0 < s.evaluation.images <= s.evaluation.clean_images, "evaluation.images", "1 to evaluation.clean_images")
    need(s.evaluation.batch_size > 0, "evaluation.batch_size", "must be above 0")
    need(s.seeds > 0 and s.seed >= 0, "seeds", "seeds must be at least 1 and seed at least 0")
    need(s.threads >= 0, "threads", "must be at least 0")
    need(s.save_seconds >= 0, "save_seconds", "must be at least 0")
    need(0 <= s.examples <= s.evaluation.images, "examples", "0 to evaluation.images")
    for name, grid in (("gaussian.sigmas", s.gaussian.sigmas), ("pgd.linf_255", s.pgd.linf_255), ("pgd.l2", s.pgd.l2)):
        # Files are named by six digits of the strength.
        need(all(v > 0 for v in grid) and len({f"{v:g}" for v in grid}) == len(grid), name, "distinct values above 0")
    need(s.rules.compared_linf_255 in s.pgd.linf_255, "rules.compared_linf_255", "must be one of pgd.linf_255")
    need(s.pgd.steps > 0 and s.pgd.restarts > 0 and s.pgd.relative_step > 0, "pgd", "its numbers must be above 0")
    for f in dataclasses.fields(s.smallest):
        need(getattr(s.smallest, f.name) > 0, f"smallest.{f.name}", "must be above 0")
    need(0 < s.lipschitz.eta < 1, "lipschitz.eta", "must lie between 0 and 1")
    for name in ("confidence", "ratio", "share"):
        need(0 < getattr(s.rules, name) < 1, f"rules.{name}", "must lie between 0 and 1")
    for name in ("min_seeds", "min_models", "comparisons", "resamples"):
        need(getattr(s.rules, name) > 0, f"rules.{name}", "must be at least 1")
