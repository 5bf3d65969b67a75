"""The rules of the verdicts: their numbers, and their words, which config.json holds before any result exists."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """The numbers in the rules of the verdicts, which are fixed before any result exists.

    Attributes:
        confidence: of every interval; each test is two-sided at the level 1 - confidence.
        ratio_margin: questions 1 and 2: factor by which the ratio of smallest adversarial to smallest Gaussian
            distortion may exceed a reference's and still count as no larger.
        nonlinear_gain: questions 1 and 2: how much higher a network's accuracy must be than that of softmax regression,
            as a proportion of images, to count as more than a linear model.
        compared_linf_255: questions 3 and 4: Linf radius, in 255ths, of the PGD under which accuracies are compared and
            stretch is observed.
        distortion_margin: question 3: smallest factor that counts as a rise of the smallest distortion.
        accuracy_margin: question 3: smallest difference that counts as a rise of the relative accuracy under PGD.
        min_seeds: smallest number of seeds for a statement about training.
        min_runs: question 4: smallest number of training runs of an arm whose final models alone are correlated; with
            fewer no correlation can be found often enough for a verdict.
        correlation: question 4: true rank correlation that the study must be able to find, and that must be excluded
            for "contradicted".
        power: probability of a verdict for which the power note computes sample sizes.
        least_power: question 4: probability of finding ``correlation`` below which the question cannot be answered.
        resamples: number of bootstrap resamples and of permutations.
    """

    confidence: float = 0.95
    ratio_margin: float = 1.25
    nonlinear_gain: float = 0.05
    compared_linf_255: float = 1.0
    distortion_margin: float = 1.1
    accuracy_margin: float = 0.05
    min_seeds: int = 3
    min_runs: int = 6
    correlation: float = 0.8
    power: float = 0.8
    least_power: float = 0.5
    resamples: int = 4000


def rules_in_words(rules: Rules) -> list[str]:
    """The rule of each question in words, with its numbers. A resumed run compares the words: never reword them."""
    interval = f"{rules.confidence:.0%} interval"
    level = f"{1 - rules.confidence:.2g}"
    ratio = (
        "The ratio of an image's smallest adversarial to its smallest Gaussian distortion is compared with that "
        "of every small reference of the run, by the median over images that both classify correctly of the "
        f"difference of logarithms. Its {interval} lies between order statistics, with censored values where they "
        "count most against the verdict. With several seeds each image counts once, with its median over seeds, "
        f"and from {rules.min_seeds} seeds on the interval also contains Student's t interval over the seeds' "
        f"medians. Supported where the upper limit is at most the logarithm of {rules.ratio_margin:g} for every "
        "reference, contradicted where the lower limit exceeds it for every reference. Undetermined otherwise; "
        "without softmax regression among the references; and where the lower limit of the difference in clean "
        f"accuracy from it is not above {rules.nonlinear_gain:g}, because a linear model must not pass for a deep "
        "one. That every reference must agree keeps the level without correction."
    )
    rise = (
        f"With at least {rules.min_seeds} seeds, each giving one difference between fine-tuned and scratch, and "
        "between fine-tuned and compute-matched scratch where that is in the run: of the mean logarithm of the "
        "smallest distortion (censored at the search's ceiling) over images that both classify correctly, and of "
        f"the accuracy under PGD at Linf {rules.compared_linf_255:g}/255 relative to clean accuracy. Supported "
        f"where Student's t test over seeds finds every difference above 0 at {level}, two-sided (all must, which "
        "keeps the level without correction). Contradicted where the upper limits of both differences from "
        "compute-matched scratch (from scratch if that is not in the run) are below a rise by the factor "
        f"{rules.distortion_margin:g} and by {rules.accuracy_margin:g}. Undetermined otherwise, and where a seed's "
        "difference does not exist. With one source for all seeds the statement is about that source."
    )
    correlation = (
        "Within the arms scratch and finetune, each by itself: Spearman's correlation between the mean logarithm "
        "of the smallest distortion, over fixed images that all models of the arm classify correctly, and the "
        "logarithm of the upper Lipschitz constant, certified and observed (the largest stretch under PGD at Linf "
        f"{rules.compared_linf_255:g}/255), over the median margin. With at least {rules.min_runs} runs in an arm "
        "over its final models; with fewer over all snapshots, partial on epoch and clean accuracy. Tests permute "
        f"whole runs. Undetermined where a true correlation of {rules.correlation:g}, attenuated by the "
        "reliability of the distortions, would be found by this rule with a probability below "
        f"{rules.least_power:g}. Otherwise supported where all four correlations differ from 0 at {level}, "
        f"two-sided, and have one sign; contradicted where all four {interval}s (Bonett and Wright 2000) exclude "
        f"{rules.correlation:g}, attenuated, in both directions."
    )
    return [ratio, ratio, rise, correlation]
