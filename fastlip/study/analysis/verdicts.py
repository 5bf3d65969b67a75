"""The four questions and the verdicts on them, by the rules of :mod:`fastlip.study.settings.rules`."""

from fastlip.study.settings.rules import Rules, rules_in_words
from fastlip.study.settings.training import TRANSFER
from fastlip.study.storage.schema import Comparison, Model, Point, Verdict

QUESTIONS = (
    "Does the finding of Szegedy et al. hold for a bigger model (trained from scratch)?",
    "Does it hold for the pre-trained model?",
    "Does pre-training raise adversarial robustness?",
    "Do “unstability” (the Lipschitz constant) and average distortion correlate, in both cases?",
)

CASES = {"from scratch": ("scratch",), "pre-trained": TRANSFER}


def verdicts(models: list[Model], comparisons: list[Comparison], points: list[Point], rules: Rules) -> list[Verdict]:
    """The four verdicts, which depend on the arguments alone."""
    words = rules_in_words(rules)
    return [
        Verdict(
            number=i + 1,
            question=QUESTIONS[i],
            headline="",
            rule=words[i],
            verdict="undetermined",
            because="",
            change="",
            statistics=[],
        )
        for i in range(4)
    ]
