"""The shapes of what a run writes: results.json, version 2, and the JSON files and arrays that it is made from.

What is read back goes through :mod:`~fastlip.study.storage.json_files` or :mod:`~fastlip.study.storage.array_files`.
"""

from typing import Literal, TypedDict

SCHEMA = "fastlip.study.results/2"

#: Said wherever results on generated images are shown.
GENERATED = "THE IMAGES OF THIS RUN ARE GENERATED. THEY ARE NOT PHOTOGRAPHS, AND NO NUMBER HERE SPEAKS ABOUT REAL DATA."

VerdictName = Literal["supported", "contradicted", "undetermined"]


class Proportion(TypedDict):
    """A share k of n with its exact binomial (Clopper-Pearson) interval."""

    k: int
    n: int
    value: float | None
    low: float
    high: float
    confidence: float


class Estimate(TypedDict):
    """A number computed from n observations with its interval."""

    n: int
    value: float | None
    low: float | None
    high: float | None
    confidence: float


class Stretch(TypedDict):
    """Observed |f(x') - f(x)| / |x' - x| at the logits, L2: a lower side of the Lipschitz constant."""

    mean: Estimate
    largest: float | None


class DepthStretch(TypedDict):
    """Mean and largest stretch from the input up to each of the model's ``depth_points``, over images that moved."""

    mean: list[float]
    largest: list[float]


class Attack(TypedDict):
    """One attack at one fixed strength.

    ``norm`` is None for Gaussian noise, whose strength is sigma; radii and sigma are in units of pixels in [0, 1].
    Accuracies are over all attacked images; distortion and stretch are over those classified correctly when clean.
    ``noise_accuracy`` is the control of a PGD attack: accuracy under Gaussian noise rescaled, image by image, to the
    L2 norm of what PGD did to it.
    """

    attack: Literal["gaussian", "pgd"]
    norm: Literal["linf", "l2", "l1"] | None
    strength: float
    accuracy: Proportion
    noise_accuracy: Proportion | None
    distortion: Estimate
    stretch: Stretch
    depth: DepthStretch


class Smallest(TypedDict):
    """Distortion of the smallest perturbation found that changes the decision, over images classified correctly.

    Images on which nothing was found count as infinite in the median and are left out of the mean.
    """

    attack: Literal["gaussian", "pgd"]
    found: Proportion
    median: Estimate
    mean: Estimate
    stretch: Stretch
    depth: DepthStretch


class Member(TypedDict):
    """One attack of the stronger suite by itself."""

    name: str
    accuracy: Proportion


class Strong(TypedDict):
    """The stronger suite in one ball: an image counts as right where it stands under every attack, PGD included."""

    norm: Literal["linf", "l2", "l1"]
    strength: float
    accuracy: Proportion
    members: list[Member]


class Layer(TypedDict):
    """Certified interval of one layer's L2 operator norm."""

    name: str
    kind: str
    lower: float
    upper: float
    confidence: float
    method: str


class Lipschitz(TypedDict):
    """Certified side: the whole network's upper Lipschitz constant, and its layers.

    ``log10_upper`` holds with probability ``confidence``; ``log10_margin`` bounds the difference of any two logits; the
    product of the layers' upper norms, which leaves out everything between them, stands beside them for comparison.
    """

    log10_upper: float
    log10_margin: float
    confidence: float
    log10_layer_product: float
    layers: list[Layer]


class Jacobian(TypedDict):
    """Norm of the Jacobian of the logits at single images, from below."""

    mean: Estimate
    largest: float


class WeightSpectrum(TypedDict):
    """Singular values of one weight, flattened to [outputs, inputs * kernel]; no operator norm of a convolution.

    ``profile`` holds the singular values over the largest at eleven equally spaced ranks, first and last included.
    ``distance`` is ||W - W0|| / ||W0||, W0 the source's weight for transfer arms and the first random weight for the
    others; None for a head, which the source does not have.
    """

    layer: str
    rank: int
    largest: float
    stable_rank: float
    effective_rank: float
    distance: float | None
    profile: list[float]


class FeatureSpectrum(TypedDict):
    """Singular values of the features of one stage under one condition; ``profile`` as in :class:`WeightSpectrum`."""

    stage: str
    condition: Literal["clean", "gaussian", "pgd"]
    rank: int
    largest: float
    stable_rank: float
    effective_rank: float
    profile: list[float]


class Growth(TypedDict):
    """Distance of an image's features from those of the clean image over the norm of the latter, at one stage."""

    stage: str
    condition: Literal["gaussian", "pgd"]
    relative: Estimate


class Corruption(TypedDict):
    """Accuracy under one corruption at one severity."""

    corruption: str
    severity: int
    accuracy: Proportion


class Corruptions(TypedDict):
    """Common corruptions; ``mean`` is over all of them and its interval resamples images."""

    source: Literal["generated", "cifar10c"]
    rows: list[Corruption]
    mean: Estimate


class CertifiedAt(TypedDict):
    """Share of images classified correctly whose decision is certified within an L2 radius."""

    radius: float
    accuracy: Proportion


class Margins(TypedDict):
    """Certificates from the margin over the bound; ``log10_radius`` is the median over correctly classified images."""

    log10_radius: float | None
    certified: list[CertifiedAt]


class Smoothed(TypedDict):
    """Certificates of the smoothed classifier, each wrong with probability at most ``alpha``."""

    sigma: float
    samples: int
    alpha: float
    abstains: Proportion
    certified: list[CertifiedAt]


class Training(TypedDict):
    """Loss and accuracy of each epoch on its augmented training images."""

    images: int
    epochs: int
    processes: int
    loss: list[float]
    accuracy: list[float]


class TrainingRecord(Training):
    """training/<model>.json: how a model was trained, and on what."""

    data: str
    classes: list[str]


class Model(TypedDict):
    """One trained model.

    ``dataset``, ``architecture``, ``additional_data`` and ``clean_acc`` (per cent) are RobustBench's keys. No key of
    RobustBench's for accuracy under AutoAttack is given, because AutoAttack is not run.

    Ratios are those of the smallest adversarial to the smallest Gaussian distortion, over images classified correctly:
    0 where noise of any strength changed nothing, infinite where PGD found nothing. ``gaussian_of_same_norm`` is the
    accuracy under noise as long as the smallest perturbation that PGD found. ``largest_stretch`` is over every
    perturbation the model met.
    """

    name: str
    arm: str
    seed: int
    dataset: str
    architecture: str
    additional_data: bool
    clean_acc: float
    clean: Proportion
    attacked_clean: Proportion
    training: Training
    attacks: list[Attack]
    strong: list[Strong]
    smallest_pgd: Smallest
    smallest_gaussian: Smallest
    gaussian_of_same_norm: Proportion
    ratio_share: Proportion
    ratio_median: Estimate
    largest_stretch: float | None
    depth_points: list[str]
    lipschitz: Lipschitz
    jacobian: Jacobian
    weights: list[WeightSpectrum]
    features: list[FeatureSpectrum]
    growth: list[Growth]
    corruptions: Corruptions
    margins: Margins
    smoothing: Smoothed


class Point(TypedDict):
    """A model at some moment of its training, as question 4 sees it, on the images that all moments share.

    ``epoch`` is None at the end. ``median`` is the median smallest distortion and ``stretch`` the largest observed
    stretch of the perturbations that attain it.
    """

    run: str
    arm: str
    seed: int
    epoch: int | None
    accuracy: Proportion
    median: float | None
    stretch: float | None
    log10_upper: float


class Comparison(TypedDict):
    """One arm minus scratch for one seed: what these two models show, not what training does.

    On the same images: those that both classify correctly (median smallest distortion), or all (accuracy).
    """

    arm: str
    seed: int
    measure: Literal["median smallest distortion", "accuracy under PGD"]
    difference: Estimate


class Statistic(TypedDict):
    """One number that a verdict rests on; ``p`` and Holm's adjusted ``p_holm`` for the declared comparisons."""

    name: str
    estimate: Estimate
    p: float | None
    p_holm: float | None


class Verdict(TypedDict):
    """The answer to one question by its rule."""

    number: int
    question: str
    rule: str
    verdict: VerdictName
    because: str
    change: str
    statistics: list[Statistic]


class Power(TypedDict):
    """How many units a question needs under an assumption, for the chance ``rules.power`` of a verdict.

    ``needed`` is None where no number would do, ``had`` the number in this run (None before it).
    """

    question: int
    unit: str
    assumption: str
    needed: int | None
    had: int | None


class DeckRow(TypedDict):
    """One row of the slide deck behind this project; its sample was 96 images."""

    model: str
    attack: str
    average_distortion: float
    upper_lipschitz_constant: float
    clean_accuracy: Proportion


class Results(TypedDict):
    """results.json."""

    schema: str
    preset: str
    dataset: str
    classes: list[str]
    generated: bool
    source: str
    models: list[Model]
    points: list[Point]
    comparisons: list[Comparison]
    verdicts: list[Verdict]
    power: list[Power]
    seed_deck: list[DeckRow]
