"""What the answers to all four questions share: their parts, their statistics, and numbers in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastlip.study.analysis.statistics import number
from fastlip.study.storage.schema import Comparison, Estimate, Model, Statistic, VerdictName

#: The arms that questions 1 to 3 are about and what they are compared with, in words.
ARMS_IN_WORDS = {
    "softmax": "softmax regression",
    "mlp": "the two-layer perceptron",
    "convnet": "the small ConvNet",
    "resnet18": "ResNet-18",
    "scratch": "training from scratch",
    "matched": "training from scratch with the same compute",
    "finetune": "fine-tuning",
}


@dataclass(frozen=True)
class Answer:
    """One verdict without its question: in a sentence, by its reason, and with what would change it."""

    verdict: VerdictName
    headline: str
    because: str
    change: str
    statistics: list[Statistic] = field(default_factory=list)


def stated(name: str, n: int, value: float | None, confidence: float, p: float | None = None) -> Statistic:
    """A number without an interval."""
    return Statistic(name=name, estimate=Estimate(n=n, value=value, low=None, high=None, confidence=confidence), p=p)


def bounded(name: str, n: int, value: float, low: float, high: float, confidence: float) -> Statistic:
    """A number with an interval; what is not finite does not exist."""
    estimate = Estimate(n=n, value=number(value), low=number(low), high=number(high), confidence=confidence)
    return Statistic(name=name, estimate=estimate, p=None)


def differences(comparisons: list[Comparison], arm: str, against: str, measure: str) -> list[Comparison]:
    """The comparisons of two arms in one measure: of each seed, and of all seeds together where there are several."""
    return [c for c in comparisons if (c["arm"], c["against"], c["measure"]) == (arm, against, measure)]


def who(models: Sequence[Model]) -> str:
    """The models of one arm in words, as in "ResNet-50 (fine-tuned)", without their seeds."""
    network, _, training = models[0]["title"].removesuffix(f", seed {models[0]['seed']}").partition(", ")
    return f"{network} ({training})" if training else network


def fraction(ratio: float) -> str:
    """A ratio in words, as in "a thirtieth of", "half of" or "1.2 times"."""
    parts = round(1 / ratio) if ratio > 0 else 0
    # "Half of" is no word for 0.66, and "a third of" none for 0.4.
    if parts < 2 or abs(parts * ratio - 1) > 0.1:
        return f"{ratio:.2g} times"
    if parts == 2:
        return "half of"
    if parts >= 100:
        return f"1/{parts} of"
    tens, ones = divmod(parts, 10)
    if parts < 20:
        word = _BELOW_TWENTY[parts]
    elif ones == 0:
        word = _TENS[tens].removesuffix("y") + "ieth"
    else:
        word = f"{_TENS[tens]}-{_BELOW_TWENTY[ones]}"
    return f"{'an' if word[0] == 'e' else 'a'} {word} of"


_BELOW_TWENTY = (
    *("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    *("eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth"),
    "nineteenth",
)

_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def points(difference: float, above: str, below: str) -> str:
    """A difference of two proportions in words without a sign, as in "6.7 points more" and "40.4 points less"."""
    return f"{100 * abs(difference):.1f} points {above if difference >= 0 else below}"


def counted(n: int, what: str) -> str:
    """A number of things, as in "1 run" and "6 runs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """Words in a row: "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
