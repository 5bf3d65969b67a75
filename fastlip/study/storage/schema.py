"""Types of the JSON that a run writes: results.json, version 3, and the files that it is computed from.

Everything read back goes through :mod:`~fastlip.study.storage.json_files` or :mod:`~fastlip.study.storage.array_files`.
"""

from typing import Literal, TypedDict

from fastlip.study.settings.training import Role

SCHEMA = "fastlip.study.results/3"

#: The warning shown with all results on generated images.
GENERATED = "THE IMAGES OF THIS RUN ARE GENERATED. THEY ARE NOT PHOTOGRAPHS, AND NO NUMBER HERE SPEAKS ABOUT REAL DATA."

VerdictName = Literal["supported", "contradicted", "undetermined"]


class Proportion(TypedDict):
    """A proportion k of n with its exact binomial (Clopper-Pearson) interval; ``value`` is None where n is 0."""

    k: int
    n: int
    value: float | None
    low: float
    high: float
    confidence: float


class Estimate(TypedDict):
    """A number computed from n observations, with its interval; None stands for what does not exist."""

    n: int
    value: float | None
    low: float | None
    high: float | None
    confidence: float


class Stretch(TypedDict):
    """Observed ||f(x') - f(x)|| / ||x' - x|| at the logits in L2, which bounds the Lipschitz constant from below."""

    mean: Estimate
    largest: float | None


class DepthStretch(TypedDict):
    """Mean and largest stretch from the input to each of the model's ``depth_points``, over perturbed images."""

    mean: list[float]
    largest: list[float]


class AttackSummary(TypedDict):
    """One attack at one fixed strength.

    ``norm`` is None for Gaussian noise, whose strength is sigma; radii and sigma are in units of pixels in [0, 1].
    Accuracies are over all attacked images; distortion and stretch are over those classified correctly when clean.
    ``noise_accuracy`` is the control of a PGD attack: the accuracy under Gaussian noise which has, on each image, the
    L2 norm of PGD's perturbation.
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

    Images for which none was found count as infinite in the median, are left out of ``mean``, and count in
    ``mean_with_ceiling`` as the largest distortion that the search tries on them. ``ceiling`` is the largest of these.
    """

    attack: Literal["gaussian", "pgd"]
    found: Proportion
    median: Estimate
    mean: Estimate
    ceiling: float
    mean_with_ceiling: Estimate
    stretch: Stretch
    depth: DepthStretch


class Member(TypedDict):
    """Accuracy after one attack of the stronger suite and those before it; PGD is counted by itself."""

    name: str
    accuracy: Proportion


class Strong(TypedDict):
    """The stronger suite in one ball: an image counts as robust where no attack succeeds, PGD included."""

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
    """Certified bounds: the upper Lipschitz constant of the whole network, and the norms of its layers.

    ``log10_upper`` holds with probability ``confidence``. ``log10_margin`` bounds the difference of any two logits.
    ``log10_layer_product``, the product of the layers' upper norms, ignores everything between the layers and is given
    for comparison only; None where it is 0, as where a BatchNorm switches a block off.
    """

    log10_upper: float
    log10_margin: float
    confidence: float
    log10_layer_product: float | None
    layers: list[Layer]


class Jacobian(TypedDict):
    """Lower bounds on the norm of the Jacobian of the logits at single images."""

    mean: Estimate
    largest: float


class WeightSpectrum(TypedDict):
    """Singular values of one weight, flattened to [outputs, inputs * kernel]; not the operator norm of a convolution.

    ``profile`` holds the singular values divided by the largest at eleven equally spaced ranks, including the first and
    the last. ``distance`` is ||W - W0|| / ||W0||, where W0 is the source's weight for transfer arms and the initial
    random weight for the others. It is None for a head, which the source does not have. ``dead_taps`` is the share of a
    convolution's taps that lie beyond its input at every position; they are left out of all other numbers.
    """

    layer: str
    rank: int
    largest: float
    stable_rank: float
    effective_rank: float
    distance: float | None
    dead_taps: float
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
    """Relative change of an image's features at one stage: their distance from the clean ones over the clean norm."""

    stage: str
    condition: Literal["gaussian", "pgd"]
    relative: Estimate


class Corruption(TypedDict):
    """Accuracy, average distortion and stretch under one corruption at one severity.

    Accuracy and distortion are over all corrupted images, which are the same for all models; ``stretch`` is at the
    logits, over the images classified correctly when clean.
    """

    corruption: str
    severity: int
    accuracy: Proportion
    distortion: Estimate
    stretch: Stretch


class Corruptions(TypedDict):
    """Common corruptions; ``mean`` (accuracy) and ``distortion`` are over all of them, their intervals over images."""

    source: Literal["generated", "cifar10c"]
    rows: list[Corruption]
    mean: Estimate
    distortion: Estimate


class FlatBoundary(TypedDict):
    """The ratio of smallest adversarial to smallest Gaussian distortion that a flat decision boundary would have.

    The prediction is the median over random directions for ``dimensions`` pixels and the best of ``directions`` draws
    (Fawzi et al. 2016).
    """

    dimensions: int
    directions: int
    ratio: float


class CertifiedAt(TypedDict):
    """Proportion of images that are classified correctly and whose decision is certified within an L2 radius."""

    radius: float
    accuracy: Proportion


class Margins(TypedDict):
    """Certificates from margin over bound; ``log10_radius`` is the median over correctly classified images."""

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
    """Loss and accuracy of each epoch on the augmented training images."""

    images: int
    epochs: int
    processes: int
    loss: list[float]
    accuracy: list[float]


class TrainingRecord(Training):
    """training/<model>.json: how a model was trained, and on which data."""

    data: str
    classes: list[str]


class Model(TypedDict):
    """One model.

    ``title`` names it for readers, as in "ResNet-50, fine-tuned, seed 0". ``training`` is None for a checkpoint that
    the study did not train.

    ``dataset``, ``architecture``, ``additional_data`` and ``clean_acc`` (per cent) are RobustBench's keys. Its key for
    the accuracy under AutoAttack is absent, because AutoAttack is not run.

    A ratio is that of an image's smallest adversarial to its smallest Gaussian distortion, over images classified
    correctly: 0 where noise of no strength changed the decision, infinite where PGD found no perturbation.
    ``gaussian_of_same_norm`` is the accuracy under noise of the norm of the smallest perturbation that PGD found.
    ``largest_stretch`` is over all perturbations that the model was measured under.
    """

    name: str
    title: str
    arm: str
    role: Role
    seed: int
    dataset: str
    architecture: str
    parameters: int
    additional_data: bool
    clean_acc: float
    clean: Proportion
    attacked_clean: Proportion
    training: Training | None
    attacks: list[AttackSummary]
    strong: list[Strong]
    smallest_pgd: Smallest
    smallest_gaussian: Smallest
    gaussian_of_same_norm: Proportion
    ratio_median: Estimate
    flat_boundary: FlatBoundary
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
    """A model or snapshot as a data point of question 4, measured on fixed images.

    These are the images that all points it is compared with classify correctly. ``epoch`` is None at the end of
    training. ``log10_distortion`` is the mean over them of the logarithm of the smallest L2 distortion, censored at the
    search's ceiling; ``reliability`` is the split-half reliability over images of its differences between the runs of
    the arm. ``log10_constant`` and ``log10_stretch`` are free of the scale of the logits: the certified bound, and the
    largest stretch observed under PGD at ``rules.compared_linf_255``, over the median clean margin. All of them are
    None where they do not exist.
    """

    run: str
    arm: str
    seed: int
    epoch: int | None
    accuracy: Proportion
    log10_distortion: float | None
    reliability: float | None
    log10_constant: float | None
    log10_stretch: float | None
    log10_upper: float


class Comparison(TypedDict):
    """Two models of one seed compared on the same images: ``arm`` minus ``against``.

    Log smallest distortion: mean of the differences of natural logarithms, censored at the search's ceiling, over the
    images that both classify correctly, with Student's t interval over images. Log ratio (smallest adversarial over
    smallest Gaussian distortion): median over these images, with an interval between order statistics that holds
    whatever the censored values are. Accuracy under PGD is relative to clean accuracy, over all attacked images, with a
    bootstrap interval; clean accuracy is over all clean images, with Student's t interval.

    ``seed`` is None for all seeds together: an image counts once, with its median (log ratio) or mean (clean accuracy)
    over seeds.
    """

    arm: str
    against: str
    seed: int | None
    measure: Literal["log smallest distortion", "log ratio", "relative accuracy under PGD", "clean accuracy"]
    difference: Estimate


class Transfer(TypedDict):
    """Adversarial examples made for ``source``, judged by ``target``; both are names of models.

    ``strength`` is the L2 norm that every perturbation is scaled to, pixels in [0, 1]. ``fooled`` and ``noise`` are
    over the images that both classify correctly: the share that ``target`` gets wrong under the perturbation, and under
    Gaussian noise of the same norm. ``disjoint`` says whether the two were trained on disjoint images.
    """

    source: str
    target: str
    strength: float
    disjoint: bool
    fooled: Proportion
    noise: Proportion


class Statistic(TypedDict):
    """One number that a verdict is based on; ``p`` is None for what is judged by its interval, or only stated."""

    name: str
    estimate: Estimate
    p: float | None


class Verdict(TypedDict):
    """The answer to one question, given by its rule; ``headline`` says it as a person would."""

    number: int
    question: str
    headline: str
    rule: str
    verdict: VerdictName
    because: str
    change: str
    statistics: list[Statistic]


class Power(TypedDict):
    """What a question needs for a verdict with probability ``rules.power``, by simulation of its rule.

    ``needed`` is the sample size, None where no size that was tried is enough. ``had`` is the sample size of this run
    (None before the run), and ``probability`` the probability of the verdict ``expected`` at the preset's size.
    """

    question: int
    unit: str
    assumption: str
    expected: VerdictName
    needed: int | None
    had: int | None
    probability: float


class DeckRow(TypedDict):
    """One row of the slide deck behind this project, which had a sample of 96 images."""

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
    transfer: list[Transfer]
    verdicts: list[Verdict]
    power: list[Power]
    seed_deck: list[DeckRow]
