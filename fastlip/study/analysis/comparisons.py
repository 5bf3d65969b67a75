"""Comparisons of two models on the same images, which questions 1 to 3 are answered from."""

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from fastlip.study.analysis.statistics import (
    censored_difference,
    mean_difference,
    relative_difference,
)
from fastlip.study.analysis.summaries import StoredModel
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.settings import Settings
from fastlip.study.settings.training import REFERENCES, TRANSFER
from fastlip.study.storage.run_directory import RunDirectory, pgd_name
from fastlip.study.storage.schema import Comparison


class Decided(NamedTuple):
    """What comparisons need of one model; distortions are infinite where nothing was found, up to the ceiling."""

    right: np.ndarray  # [N] bool, attacked images
    clean: np.ndarray  # [M] bool, clean images
    under_pgd: np.ndarray  # [N] bool
    pgd: np.ndarray  # [N]
    pgd_ceiling: np.ndarray  # [N]
    gaussian: np.ndarray  # [N]
    gaussian_ceiling: np.ndarray  # [N]


def comparisons(run: RunDirectory) -> list[Comparison]:
    """All comparisons of a run, see :func:`compared`."""

    @cache
    def decided(arm: str, seed: int) -> Decided:
        model = next(m for m in run.models if (m.arm, m.seed) == (arm, seed))
        return _decided(StoredModel(run, model))

    return compared(decided, run.settings)


def compared(decided: Callable[[str, int], Decided], settings: Settings) -> list[Comparison]:
    """All comparisons of a run, whose models ``decided`` finds by arm and seed.

    The large network of every arm with every small reference, for questions 1 and 2; every transfer arm with scratch
    and with compute-matched scratch, for question 3; all pairs of checkpoints.
    """
    seeds = (settings.seed,) if settings.checkpoints else settings.all_seeds
    if settings.checkpoints:
        pairs = list(itertools.combinations(settings.checkpoints, 2))
        plan = [(compare, pair) for pair in pairs for compare in (_ratios, _accuracies, _rises)]
    else:
        large = [arm for arm in settings.arms if arm not in REFERENCES]
        small = [arm for arm in settings.arms if arm in REFERENCES]
        tuned = [arm for arm in large if arm in TRANSFER]
        baselines = [arm for arm in ("scratch", "matched") if arm in settings.arms]
        plan = [(_ratios, pair) for pair in itertools.product(large, small)]
        plan += [(_accuracies, pair) for pair in itertools.product(large, small)]
        plan += [(_rises, pair) for pair in itertools.product(tuned, baselines)]
    return [
        row
        for compare, (arm, against) in plan
        for row in compare(arm, against, {k: (decided(arm, k), decided(against, k)) for k in seeds}, settings.rules)
    ]


Pairs = dict[int, tuple[Decided, Decided]]


def _decided(stored: StoredModel) -> Decided:
    under = pgd_name("linf", stored.rules.compared_linf_255)
    smallest, noise = stored.images("smallest-pgd"), stored.images("smallest-gaussian")
    return Decided(
        right=stored.right,
        clean=stored.decided("clean"),
        under_pgd=stored.decided(under),
        pgd=smallest["distortion"],
        pgd_ceiling=smallest["ceiling"],
        gaussian=noise["distortion"],
        gaussian_ceiling=noise["ceiling"],
    )


def _ratios(arm: str, against: str, pairs: Pairs, rules: Rules) -> Iterator[Comparison]:
    """The difference of log ratios, in each seed and over all."""
    confidence = rules.confidence
    n = len(next(iter(pairs.values()))[0].right)
    low, high = np.full((2, len(pairs), n), np.nan)
    for i, (seed, (one, other)) in enumerate(pairs.items()):
        both = one.right & other.right
        (low_one, high_one), (low_other, high_other) = log_ratios(one), log_ratios(other)
        low[i, both], high[i, both] = (low_one - high_other)[both], (high_one - low_other)[both]
        difference = censored_difference(low[i, both], high[i, both], confidence)
        yield Comparison(arm=arm, against=against, seed=seed, measure="log ratio", difference=difference)
    if len(pairs) > 1:
        some = ~np.isnan(low).all(0)
        low_of_image, high_of_image = (np.nanmedian(v[:, some], axis=0) for v in (low, high))
        difference = censored_difference(low_of_image, high_of_image, confidence)
        yield Comparison(arm=arm, against=against, seed=None, measure="log ratio", difference=difference)


def log_ratios(model: Decided) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest logarithm of each image's ratio, [N]; they differ where a distortion is censored."""
    with np.errstate(divide="ignore"):  # images that are wrong to begin with have no distortion; they are not used
        adversarial, noise = np.log(model.pgd), np.log(model.gaussian)
        least = np.where(np.isinf(model.pgd), np.log(model.pgd_ceiling), adversarial)
        nearest = np.where(np.isinf(model.gaussian), np.log(model.gaussian_ceiling), noise)
    with np.errstate(invalid="ignore"):  # the same
        return least - noise, adversarial - nearest


def _accuracies(arm: str, against: str, pairs: Pairs, rules: Rules) -> Iterator[Comparison]:
    """The difference in clean accuracy, in each seed and over all."""
    confidence = rules.confidence

    def row(seed: int | None, a: np.ndarray, b: np.ndarray) -> Comparison:
        difference = mean_difference(a, b, confidence)
        return Comparison(arm=arm, against=against, seed=seed, measure="clean accuracy", difference=difference)

    for seed, (one, other) in pairs.items():
        yield row(seed, one.clean, other.clean)
    if len(pairs) > 1:
        yield row(None, *(np.mean([pair[i].clean for pair in pairs.values()], axis=0) for i in (0, 1)))


def _rises(arm: str, against: str, pairs: Pairs, rules: Rules) -> Iterator[Comparison]:
    """The differences in log distortion and in relative accuracy under PGD, in each seed."""
    for seed, (one, other) in pairs.items():
        both = one.right & other.right
        a, b = (np.log(np.minimum(model.pgd, model.pgd_ceiling)[both]) for model in (one, other))
        distance = mean_difference(a, b, rules.confidence)
        yield Comparison(arm=arm, against=against, seed=seed, measure="log smallest distortion", difference=distance)
        relative = relative_difference(
            (one.under_pgd, other.under_pgd), (one.right, other.right), rules.confidence, rules.resamples
        )
        yield Comparison(
            arm=arm, against=against, seed=seed, measure="relative accuracy under PGD", difference=relative
        )
