"""The shape of results.json, version 1."""

from typing import Literal, TypedDict

from fastlip.study.statistics import Estimate, Rate

SCHEMA = "fastlip.study.results/1"

#: Said wherever results on generated images are shown.
GENERATED = "THE IMAGES OF THIS RUN ARE GENERATED. THEY ARE NOT PHOTOGRAPHS, AND NO NUMBER HERE SPEAKS ABOUT REAL DATA."

VerdictName = Literal["supported", "contradicted", "undetermined"]


class Stretch(TypedDict):
    """Observed |f(x') - f(x)| / |x' - x| at the logits, L2: a lower side of the Lipschitz constant."""

    mean: Estimate
    largest: float | None


class Attack(TypedDict):
    """One attack at one fixed strength.

    ``norm`` is None for Gaussian noise, whose strength is sigma; radii and sigma are in units of pixels in [0, 1].
    Accuracy is over all attacked images; distortion and stretch are over those classified correctly when clean.
    """

    attack: Literal["gaussian", "pgd"]
    norm: Literal["linf", "l2"] | None
    strength: float
    accuracy: Rate
    distortion: Estimate
    stretch: Stretch


class Smallest(TypedDict):
    """Distortion of the smallest perturbation found that changes the decision, over images classified correctly.

    Images on which nothing was found count as infinite in the median and are left out of the mean.
    """

    attack: Literal["gaussian", "pgd"]
    found: Rate
    median: Estimate
    mean: Estimate
    stretch: Stretch


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

    ``log10_upper`` holds with probability ``confidence``; the product of the layers' upper norms, which leaves out
    everything between them, stands beside it for comparison.
    """

    log10_upper: float
    confidence: float
    log10_layer_product: float
    layers: list[Layer]


class Training(TypedDict):
    """Loss and accuracy of each epoch on its augmented training images."""

    images: int
    epochs: int
    loss: list[float]
    accuracy: list[float]


class Model(TypedDict):
    """One trained model.

    ``dataset``, ``architecture``, ``additional_data`` and ``clean_acc`` (per cent) are RobustBench's keys. No key of
    RobustBench's for accuracy under AutoAttack is given, because AutoAttack is not run.

    Ratios are those of the smallest adversarial to the smallest Gaussian distortion, over images classified correctly:
    0 where noise of any strength changed nothing, infinite where PGD found nothing. ``largest_stretch`` is over every
    perturbation the model met.
    """

    name: str
    arm: str
    seed: int
    dataset: str
    architecture: str
    additional_data: bool
    clean_acc: float
    clean: Rate
    attacked_clean: Rate
    training: Training
    attacks: list[Attack]
    smallest_pgd: Smallest
    smallest_gaussian: Smallest
    gaussian_of_same_norm: Rate
    ratio_share: Rate
    ratio_median: Estimate
    largest_stretch: float | None
    lipschitz: Lipschitz


class Comparison(TypedDict):
    """Fine-tuned minus scratch on the same images, for one seed: what these two models show, not what training does."""

    seed: int
    measure: Literal["median smallest distortion", "accuracy under PGD"]
    difference: Estimate


class Statistic(TypedDict):
    """One number that a verdict rests on."""

    name: str
    estimate: Estimate


class Verdict(TypedDict):
    """The answer to one question by its rule."""

    number: int
    question: str
    rule: str
    verdict: VerdictName
    because: str
    statistics: list[Statistic]


class DeckRow(TypedDict):
    """One row of the slide deck behind this project; its sample was 96 images."""

    model: str
    attack: str
    average_distortion: float
    upper_lipschitz_constant: float
    clean_accuracy: Rate


class Results(TypedDict):
    """results.json."""

    schema: str
    preset: str
    dataset: str
    classes: list[str]
    generated: bool
    source: str
    models: list[Model]
    comparisons: list[Comparison]
    verdicts: list[Verdict]
    seed_deck: list[DeckRow]
