"""The settings of a run: frozen dataclasses, presets of them, and overrides by dotted name."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastlip.study.errors import StudyError
from fastlip.study.json_types import require
from fastlip.study.settings import checks

#: Arms that start from the source: all weights, the head alone, the last stage and the head, the head and then all.
TRANSFER = ("finetune", "linear", "partial", "lpft")
ARMS = ("reference", "scratch", *TRANSFER)
SOURCES = ("generated", "imagenet", "checkpoint", "folder")

#: Corruptions that the study generates itself (:mod:`fastlip.study.measure.corruptions`).
GENERATED_CORRUPTIONS = (
    "gaussian_noise",
    "gaussian_blur",
    "brightness",
    "contrast",
    "saturate",
    "pixelate",
    "jpeg_compression",
)


#: A ball around an image: its norm, its strength as written in the settings, its radius for pixels in [0, 1].
Ball = tuple[Literal["linf", "l2", "l1"], float, float]


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
        snapshots: epochs after which the weights are kept and measured on their way, for question 4.
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
    snapshots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The test images that everything is measured on.

    Attributes:
        images: attacked test images, the same number of each class, fixed by their order in the test set.
        clean_images: test images for clean accuracy alone; the attacked ones are the first of them.
        snapshot_images: attacked images that the snapshots of training are measured on, the first of them.
        batch_size: images per forward pass.
    """

    images: int
    clean_images: int
    snapshot_images: int = 48
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
        l1: radii of the L1 ball, pixels in [0, 1].
        steps: gradient steps.
        relative_step: step size times ``steps`` over the radius.
        loss: "dlr" or "ce".
        restarts: runs from other random starts; the strongest counts.
    """

    linf_255: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    l2: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    l1: tuple[float, ...] = (1.0, 3.0, 6.0)
    steps: int = 10
    relative_step: float = 2.5
    loss: Literal["dlr", "ce"] = "dlr"
    restarts: int = 1

    @property
    def grid(self) -> list[Ball]:
        """Every ball attacked."""
        return _balls(self.linf_255, self.l2, self.l1)


@dataclass(frozen=True)
class Strong:
    """The stronger suite: an image stands only where it stands under all of its attacks.

    Attributes:
        linf_255: radii of the Linf ball in 255ths of the pixel range.
        l2: radii of the L2 ball, pixels in [0, 1].
        steps: gradient steps of APGD, with cross-entropy and with the margin to each target.
        restarts: runs of APGD with cross-entropy.
        targets: wrong classes, the likeliest first, that targeted APGD tries one by one.
        queries: forward passes of the black-box attack (Square).
    """

    linf_255: tuple[float, ...] = (1.0,)
    l2: tuple[float, ...] = (0.25,)
    steps: int = 20
    restarts: int = 1
    targets: int = 3
    queries: int = 200

    @property
    def grid(self) -> list[Ball]:
        """Every ball attacked."""
        return _balls(self.linf_255, self.l2, ())


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
    """Certified norms and Jacobian norms.

    Attributes:
        eta: probability, over all random starts of the run, that any stated upper bound fails.
        jacobian_images: images at which the norm of the Jacobian is computed.
        jacobian_steps: most steps of its power iteration.
    """

    eta: float = 1e-6
    jacobian_images: int = 16
    jacobian_steps: int = 15


@dataclass(frozen=True)
class Features:
    """Spectra of feature maps, and the growth of perturbations with depth.

    Attributes:
        images: images whose features are taken, clean, under PGD at ``rules.compared_linf_255`` and under Gaussian
            noise of the same norm.
    """

    images: int = 96


@dataclass(frozen=True)
class Corruptions:
    """Common corruptions.

    Attributes:
        severities: from 1 to 5.
        images: images corrupted, the first of the attacked ones.
    """

    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    images: int = 96


@dataclass(frozen=True)
class Smoothing:
    """Randomised smoothing (Cohen et al. 2019): certificates for the model's decision under Gaussian noise.

    Attributes:
        images: images certified, the first of the attacked ones.
        sigma: standard deviation of the noise, pixels in [0, 1].
        selection: draws that choose the class.
        samples: draws that certify it.
        alpha: probability that one image's certificate is wrong.
    """

    images: int = 20
    sigma: float = 0.1
    selection: int = 16
    samples: int = 128
    alpha: float = 0.001


@dataclass(frozen=True)
class Rules:
    """Numbers in the rules that turn statistics into verdicts; fixed before any result exists.

    Attributes:
        confidence: of the intervals of single rates and means.
        ratio: questions 1 and 2: smallest adversarial over smallest Gaussian distortion counts up to this ratio.
        share: questions 1 and 2: the lower limit of the share of images below the ratio must exceed this.
        compared_linf_255: question 3: Linf radius at which accuracies under PGD are compared.
        min_seeds: question 3: seeds below which nothing is said.
        min_runs: question 4: training runs (arm and seed) of a case below which nothing is said about it.
        no_correlation: question 4: correlations within plus or minus this count as none.
        power: chance of a verdict that the power note plans for.
        resamples: bootstrap resamples.
    """

    confidence: float = 0.95
    ratio: float = 0.1
    share: float = 0.9
    compared_linf_255: float = 1.0
    min_seeds: int = 3
    min_runs: int = 6
    no_correlation: float = 0.2
    power: float = 0.8
    resamples: int = 4000


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's results, apart from the data and the machine.

    Attributes:
        preset: name of the preset that this started from.
        dataset: "generated" or "cifar10".
        source: what the transfer arms start from: "generated" and "folder" are pre-trained on by the study itself.
        corrupted: "generated" with torchvision, or the files of CIFAR-10-C.
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
        precision: "auto", "float32" or "bfloat16" for the matrix work of training; attacks and every reported
            prediction are float32.
        compile: whether training compiles the network: "auto" (on a GPU), "on" or "off".
        threads: CPU threads; 0 takes torch's default.
        save_seconds: a training run in progress is saved this often.
        examples: test images shown in the report.
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
    evaluation: Evaluation
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
    gaussian: Gaussian = field(default_factory=Gaussian)
    pgd: Pgd = field(default_factory=Pgd)
    strong: Strong = field(default_factory=Strong)
    smallest: Smallest = field(default_factory=Smallest)
    lipschitz: Lipschitz = field(default_factory=Lipschitz)
    features: Features = field(default_factory=Features)
    corruptions: Corruptions = field(default_factory=Corruptions)
    smoothing: Smoothing = field(default_factory=Smoothing)
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        checks.check(self)

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


def _balls(linf_255: tuple[float, ...], l2: tuple[float, ...], l1: tuple[float, ...]) -> list[Ball]:
    found: list[Ball] = [("linf", v, v / 255) for v in linf_255]
    found += [("l2", v, v) for v in l2]
    return found + [("l1", v, v) for v in l1]


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
    """The settings that :func:`to_json` wrote.

    Raises:
        ValueError: a value is of another type.
        StudyError: settings were added or removed since, or one is out of range.
    """
    settings: Settings = _build(Settings, plain, "")
    return settings


def _build(kind: Any, plain: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    require(plain, dict[str, Any], prefix.rstrip(".") or "settings")
    if set(plain) != set(hints):
        names = sorted(prefix + name for name in set(plain) ^ set(hints))
        raise StudyError(f"the run was made by another version of fastlip: {names[:3]} differ")
    values = {}
    for name, value in plain.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{prefix}{name}.")
        else:
            require(value, hints[name], prefix + name)
            value = tuple(value) if isinstance(value, list) else value
        values[name] = value
    return kind(**values)
