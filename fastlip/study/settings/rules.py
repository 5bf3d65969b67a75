"""The rules of the verdicts: their numbers, and their words, which config.json holds before any result exists."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """The numbers in the rules of the verdicts, which are fixed before any result exists.

    Attributes:
        confidence: of the intervals of single proportions and means.
        ratio: questions 1 and 2: largest ratio of smallest adversarial to smallest Gaussian distortion that counts.
        share: questions 1 and 2: what the lower limit of the proportion of images below the ratio must exceed.
        compared_linf_255: question 3: Linf radius, in 255ths, at which accuracies under PGD are compared.
        min_seeds: question 3: smallest number of seeds for a verdict.
        min_runs: question 4: smallest number of training runs (arm and seed) in each case for a verdict.
        no_correlation: question 4: largest absolute correlation that counts as none.
        power: probability of a verdict for which the power analysis computes sample sizes.
        resamples: number of bootstrap resamples.
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


#: Number of comparisons under Holm's correction: two of question 3 and four of question 4.
COMPARISONS = 6


def rules_in_words(rules: Rules) -> list[str]:
    """The rule of each question in words, with its numbers. A resumed run compares the words: never reword them."""
    share = (
        f"Supported where the lower {rules.confidence:.0%} limit of the share of correctly classified images whose "
        f"smallest adversarial distortion is at most {rules.ratio:g} of their smallest Gaussian distortion exceeds "
        f"{rules.share:g}; contradicted where the upper limit is below {rules.share:g}; with several "
        "seeds, in every one."
    )
    declared = (
        f"Questions 3 and 4 declare {COMPARISONS} comparisons; Holm's correction over all of them keeps the chance of "
        f"any false one at {1 - rules.confidence:.2g}, and each interval has the level at which Holm tests it."
    )
    return [
        share,
        share,
        f"With at least {rules.min_seeds} seeds: supported where two differences over seeds (Student's t), fine-tuned "
        "minus scratch on the same images, of the median smallest distortion (images that both classify correctly) and "
        f"of the accuracy under PGD at Linf {rules.compared_linf_255:g}/255 (all images), are above 0 after "
        "correction; contradicted where both are below; undetermined otherwise, and where a seed's median is censored. "
        f"{declared}",
        f"With at least {rules.min_runs} training runs in each case (from scratch; pre-trained, by any method): "
        "supported where Spearman's correlation between median smallest distortion and the Lipschitz constant, over "
        "runs and their snapshots with whole runs resampled, differs from 0 after correction in both cases, for the "
        "certified and for the observed constant, all four with one sign; contradicted where all four intervals lie "
        f"within ±{rules.no_correlation:g}; undetermined otherwise. {declared}",
    ]
