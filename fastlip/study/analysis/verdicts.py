"""The four questions and the verdicts on them, by the rules of :mod:`fastlip.study.settings.rules`."""

from fastlip.study.analysis import correlation_answer, ratio_answer, rise_answer
from fastlip.study.analysis.answers import Answer
from fastlip.study.settings.rules import Rules, rules_in_words
from fastlip.study.storage.schema import Comparison, Model, Point, Transfer, Verdict

QUESTIONS = (
    "Does the finding of Szegedy et al. hold for a bigger model (trained from scratch)?",
    "Does it hold for the pre-trained model?",
    "Does pre-training raise adversarial robustness?",
    "Do “unstability” (the Lipschitz constant) and average distortion correlate, in both cases?",
)


def verdicts(
    models: list[Model],
    comparisons: list[Comparison],
    points: list[Point],
    transfer: list[Transfer],
    rules: Rules,
    *,
    one_source: bool,
) -> list[Verdict]:
    """The four verdicts, which depend on the arguments alone; ``one_source`` says that all seeds share their source."""
    return [
        Verdict(
            number=number,
            question=question,
            headline=answer.headline,
            rule=rule,
            verdict=answer.verdict,
            because=answer.because,
            change=answer.change,
            statistics=answer.statistics,
        )
        for number, (question, rule, answer) in enumerate(
            zip(
                QUESTIONS,
                rules_in_words(rules),
                _answers(models, comparisons, points, transfer, rules, one_source),
                strict=True,
            ),
            1,
        )
    ]


def _answers(
    models: list[Model],
    comparisons: list[Comparison],
    points: list[Point],
    transfer: list[Transfer],
    rules: Rules,
    one_source: bool,
) -> list[Answer]:
    if any(m["role"] == "checkpoint" for m in models):
        because = "This run measures checkpoints; the questions are about arms."
        change = "Train the arms of the study; the comparisons list all pairs of these checkpoints."
        return [Answer("undetermined", "Not asked: this run measures checkpoints.", because, change)] * len(QUESTIONS)
    large = {m["arm"] for m in models if m["role"] != "reference"}
    # Questions 1 to 3 are about networks as they are usually trained.
    constrained = {m["name"] for m in models if m["arm"] == "constrained"}
    transfer = [t for t in transfer if t["source"] not in constrained]
    return [
        ratio_answer.answer("scratch", models, comparisons, transfer, rules),
        ratio_answer.answer("finetune", models, comparisons, transfer, rules),
        rise_answer.answer(models, comparisons, one_source, rules),
        correlation_answer.answer(points, large, rules),
    ]
