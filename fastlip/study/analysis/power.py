"""The power note: how probable the verdicts are at a run's size, and what size they need, by simulating their rules.

Each assumption is stated with its number. Their spreads are those of the first protocol's six seeds on CIFAR-10.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

from fastlip.study.analysis import decisions
from fastlip.study.analysis.statistics import median_limits
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.settings import Settings
from fastlip.study.settings.training import REFERENCES
from fastlip.study.storage.schema import Power, VerdictName

#: Number of simulated studies behind each probability.
STUDIES = 400

#: Share of attacked images that the large network and a small reference both classify correctly.
_BOTH = 0.35

#: Spread of one model's log ratios: the scale of Student's t with 5 degrees of freedom, the share of its variance that
#: all seeds have in common, the share of censored ones, and the standard deviation between seeds. Two models of a seed
#: then differ by a robust standard deviation of 0.64 (measured: 0.59 to 0.66); the common share was measured as 0.21.
_RATIO_SCALE, _RATIO_COMMON, _CENSORED, _RATIO_SEEDS = 0.44, 0.2, 0.04, 0.03

#: Difference in clean accuracy from softmax regression, and the variance of one image's.
_GAIN, _GAIN_VARIANCE = 0.15, 0.45

#: Standard deviations between seeds of the difference of two arms' mean log distortions and relative accuracies: what
#: does not depend on the images, and what does, which was measured on a number of attacked images and shrinks with its
#: root; and the correlation of the two measures.
_RISE_SEEDS, _RISE_OF_IMAGES, _RISE_IMAGES, _RISE_CORRELATION = (0.03, 0.01), (0.076, 0.032), 400, 0.5

#: Largest number of seeds that is tried, exclusive.
_MOST_SEEDS = 41

#: Reliability of a run's mean log distortion over this number of common images; and the share of attacked images that
#: all runs of an arm classify correctly.
_RELIABILITY, _RELIABILITY_IMAGES, _COMMON = 0.33, 150, 0.37

#: Rank correlation of the certified and the observed constant, beyond what both owe to the distortion.
_CONSTANTS = 0.5


def sample_sizes(settings: Settings) -> list[Power]:
    """What each question needs, and its chances in a run with these ``settings``; part of config.json."""
    if settings.checkpoints:
        return []
    return [
        *_ratio_rows(1, "scratch", settings),
        *_ratio_rows(2, "finetune", settings),
        *_rise_rows(settings),
        *_correlation_rows(settings),
    ]


def _ratio_rows(question: int, arm: str, settings: Settings) -> list[Power]:
    unit = "images that the large network and a reference both classify correctly"
    references = [name for name in settings.arms if name in REFERENCES]
    if arm not in settings.arms or "softmax" not in references:
        return [_unanswered(question, unit, f"the run has not both the arms {arm} and softmax")]
    images, rules = round(_BOTH * settings.evaluation.images), settings.rules
    sizes = (50, 70, 100, 140, 200, 280, 400, 560)
    cases: tuple[tuple[VerdictName, float], ...] = (("supported", 1.0), ("contradicted", 2.0))
    rows = []
    for expected, factor in cases:
        every = tuple(sorted({*sizes, images}))
        clean = settings.evaluation.clean_images
        chances = ratio_chances(factor, every, len(references), settings.seeds, clean, rules)
        chance = {n: chances[n, expected] for n in sizes}
        rows.append(
            Power(
                question=question,
                unit=unit,
                assumption=f"the true ratio is {'' if factor == 1 else f'{factor:g} times '}that of all references "
                f"({len(references)} in the run), and both models classify {100 * _BOTH:g}% of the attacked images "
                "correctly",
                expected=expected,
                needed=_least(sizes, chance.__getitem__, rules.power),
                had=None,
                probability=chances[images, expected],
            )
        )
    return rows


def _rise_rows(settings: Settings) -> list[Power]:
    if not {"scratch", "finetune"} <= set(settings.arms):
        return [_unanswered(3, "seeds", "the run has not both the arms scratch and finetune")]
    rules, baselines, images = settings.rules, 1 + ("matched" in settings.arms), settings.evaluation.images
    cases: tuple[tuple[VerdictName, float, float], ...] = (
        ("supported", rules.distortion_margin, rules.accuracy_margin),
        ("supported", rules.distortion_margin**2, 2 * rules.accuracy_margin),
        ("contradicted", 1.0, 0.0),
    )
    spread, rows = _rise_spread(images), []
    for expected, factor, accuracy in cases:
        chances = {
            n: rise_chances(factor, accuracy, n, images, baselines, rules)[expected]
            for n in {settings.seeds, *range(rules.min_seeds, _MOST_SEEDS)}
        }
        rows.append(
            Power(
                question=3,
                unit="seeds",
                assumption=f"fine-tuning multiplies smallest distortions by {factor:.3g} and changes the relative "
                f"accuracy by {accuracy:g}; the differences of the arms have standard deviations between seeds of "
                f"{spread[0]:.2g} (of the logarithm) and {spread[1]:.2g} on {images} attacked images",
                expected=expected,
                needed=_least(range(rules.min_seeds, _MOST_SEEDS), chances.__getitem__, rules.power),
                had=None,
                probability=chances[settings.seeds],
            )
        )
    return rows


def _correlation_rows(settings: Settings) -> list[Power]:
    unit = "training runs of each arm"
    if not {"scratch", "finetune"} <= set(settings.arms):
        return [_unanswered(4, unit, "the run has not both the arms scratch and finetune")]
    rules = settings.rules
    factor = _COMMON * settings.evaluation.images / _RELIABILITY_IMAGES
    # Spearman-Brown, from the number of images that it was measured on.
    reliability = round(factor * _RELIABILITY / (1 + (factor - 1) * _RELIABILITY), 2)
    rows = []
    cases: tuple[tuple[VerdictName, float], ...] = (("supported", rules.correlation), ("contradicted", 0.0))
    for expected, rho in cases:

        def chance(n: int, expected: VerdictName = expected, rho: float = rho) -> float:
            # The rule gives no verdict where it would hardly find the correlation.
            answered = chance_to_find(n, reliability, rules) >= rules.least_power
            return correlation_chances(rho, n, reliability, rules)[expected] if answered else 0.0

        rows.append(
            Power(
                question=4,
                unit=unit,
                assumption=f"the true rank correlation is {rho:g}, and the distortions over "
                f"{settings.evaluation.images} attacked images have a reliability of {reliability:g}",
                expected=expected,
                needed=_least((*range(rules.min_runs, 20), 20, 24, 28, 32, 40, 48, 64, 96), chance, rules.power),
                had=None,
                probability=chance(settings.seeds),
            )
        )
    return rows


def _unanswered(question: int, unit: str, why: str) -> Power:
    return Power(
        question=question, unit=unit, assumption=why, expected="undetermined", needed=None, had=None, probability=1.0
    )


def _least(sizes: Sequence[int], chance: Callable[[int], float], wanted: float) -> int | None:
    """The first of the increasing ``sizes`` whose chance reaches the one wanted; None where the last one's does not."""
    if chance(sizes[-1]) < wanted:
        return None
    return next(size for size in sizes if chance(size) >= wanted)


def _shares(found: np.ndarray) -> dict[VerdictName, float]:
    return {name: float((found == value).mean()) for value, name in decisions.NAMES.items()}


@lru_cache
def ratio_chances(
    factor: float, sizes: tuple[int, ...], references: int, seeds: int, clean_images: int, rules: Rules
) -> dict[tuple[int, VerdictName], float]:
    """Chances of the verdicts of questions 1 and 2 by number of images, for a ratio ``factor`` times a reference's."""
    rng = np.random.default_rng(0)
    spread = np.sqrt(_GAIN_VARIANCE / clean_images)
    gain = _GAIN + spread * (rng.normal(size=STUDIES) - stats.norm.isf((1 - rules.confidence) / 2))
    # Models along the second dimension, the large network first. The sizes share their images.
    shape = (STUDIES, 1 + references, max(sizes), seeds)
    common, own = _heavy_tailed(rng, (*shape[:3], 1)), _heavy_tailed(rng, shape)
    log_ratio = _RATIO_SCALE * (
        np.sqrt(np.float32(_RATIO_COMMON)) * common + np.sqrt(np.float32(1 - _RATIO_COMMON)) * own
    )
    censored = rng.random(shape, dtype=np.float32) < _CENSORED
    between = _RATIO_SEEDS * rng.standard_normal((STUDIES, references, 1, seeds), dtype=np.float32)
    difference = log_ratio[:, :1] - log_ratio[:, 1:] + np.float32(np.log(factor)) + between
    low, high = np.where(censored[:, :1], -np.inf, difference), np.where(censored[:, 1:], np.inf, difference)
    low_of_image, high_of_image = (np.median(v, axis=-1) for v in (low, high))
    found: dict[tuple[int, VerdictName], float] = {}
    for n in sizes:
        limits = (median_limits(v[..., :n], rules.confidence) for v in (low_of_image, high_of_image))
        (least, _), (_, most) = limits
        of_seed = np.median(difference[..., :n, :], axis=-2)
        verdicts = decisions.ratios(*decisions.over_images_and_seeds(least, most, of_seed, rules), gain, rules)
        found |= {(n, name): share for name, share in _shares(verdicts).items()}
    return found


def _heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 5 degrees of freedom."""
    normal = rng.standard_normal(shape, dtype=np.float32)
    return normal / np.sqrt(rng.standard_gamma(2.5, shape, dtype=np.float32) / np.float32(2.5))


def rise_chances(
    factor: float, accuracy: float, seeds: int, images: int, baselines: int, rules: Rules
) -> dict[VerdictName, float]:
    """Chances of the verdicts of question 3 where fine-tuning has these effects against every baseline."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2, STUDIES, 1 + baselines, 2, seeds))
    both = shared[..., :1, :]  # of the two measures of one model
    spread = np.sqrt(_RISE_CORRELATION) * both + np.sqrt(1 - _RISE_CORRELATION) * own
    of_model = spread * _rise_spread(images)[:, None] / np.sqrt(2)
    effect = np.array([np.log(factor), accuracy])[:, None]
    return _shares(decisions.rises(effect + of_model[:, :1] - of_model[:, 1:], rules))


def _rise_spread(images: int) -> np.ndarray:
    """Standard deviations between seeds of the two differences of question 3, [2]."""
    return np.hypot(_RISE_SEEDS, np.array(_RISE_OF_IMAGES) * np.sqrt(_RISE_IMAGES / images))


@lru_cache
def correlation_chances(rho: float, runs: int, reliability: float, rules: Rules) -> dict[VerdictName, float]:
    """Chances of the verdicts of question 4 with this true correlation and ``runs`` runs in each of two arms."""
    rng = np.random.default_rng(0)
    shape = (STUDIES, 2, 1, runs)
    true, noise = rng.normal(size=(2, *shape))
    shared, own = rng.normal(size=shape), rng.normal(size=(STUDIES, 2, 2, runs))
    else_ = np.sqrt(_CONSTANTS) * shared + np.sqrt(1 - _CONSTANTS) * own
    # Pearson's correlation of normal variables with Spearman's rho.
    r = 2 * np.sin(np.pi * rho / 6)
    instability = -r * true + np.sqrt(1 - r * r) * else_
    distortion = np.broadcast_to(np.sqrt(reliability) * true + np.sqrt(1 - reliability) * noise, instability.shape)
    flat = (STUDIES, 4, runs)
    found = decisions.correlations_of(instability.reshape(flat), distortion.reshape(flat), reliability, rules)
    return _shares(found)


def chance_to_find(runs: int, reliability: float, rules: Rules) -> float:
    """Probability that the rule finds ``rules.correlation`` with so many runs in each arm."""
    # Snapshots of a run are no runs, and distortions without any reliability measure nothing.
    if runs < rules.min_runs or not reliability > 0:
        return 0.0
    return correlation_chances(rules.correlation, runs, round(reliability, 2), rules)["supported"]
