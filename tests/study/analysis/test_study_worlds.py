"""Planted worlds: 200 simulated studies each, from per-image measurements to verdicts, whose truth is known.

A false verdict may be given in no more studies than its level allows, the power is what the power note says, and a
linear model never passes for a deep network.
"""

import dataclasses
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis import correlation_answer, power
from fastlip.study.analysis.comparisons import Decided, compared
from fastlip.study.analysis.statistics import censored_difference
from fastlip.study.analysis.verdicts import verdicts
from fastlip.study.settings import presets
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.training import REFERENCES

STUDIES = 200
RULES = Rules(resamples=20)  # resamples make intervals of single comparisons, which no verdict reads
IMAGES, CLEAN = 400, 2000


class World(NamedTuple):
    """The truth about the large network, beside references whose log ratios have a median of 0.

    Attributes:
        ratio: factor by which its ratio exceeds theirs.
        gain: how much more accurate it is than they are.
        rise: factor by which fine-tuning multiplies smallest distortions.
        relative: by which it raises the relative accuracy under PGD.
        raised: the arms of which both are true.
    """

    ratio: float = 1.0
    gain: float = 0.15
    rise: float = 1.0
    relative: float = 0.0
    raised: tuple[str, ...] = ("finetune",)


def settings_of(seeds, arms):
    full = presets.preset("full")
    evaluation = dataclasses.replace(full.evaluation, images=IMAGES, clean_images=CLEAN)
    return dataclasses.replace(full, arms=arms, seeds=seeds, evaluation=evaluation, rules=RULES)


def study(rng, world, settings):
    """Per-image measurements of all models of a study, by arm and seed, and their entries in results.json."""
    images = settings.evaluation.images
    measured, models = {}, []
    easy, known = rng.random(images), rng.random(CLEAN)
    for arm in settings.arms:
        role = settings.role_of(arm)
        large = role != "reference"
        of_images = heavy(rng, images)
        for seed in settings.all_seeds:
            right = easy < (0.8 if large else 0.4)
            spread = 0.44 * (np.sqrt(0.2) * of_images + np.sqrt(0.8) * heavy(rng, images)) + 0.02 * rng.normal()
            ratio = 0.03 * np.exp(spread) * (world.ratio if large else 1.0)
            # Smallest distortions vary by the image and by the model; about 70% of the images stand.
            effect = np.log(world.rise) if arm in world.raised else 0.0
            pgd = 0.01 * np.exp(effect + rng.normal(size=images) + 0.02 * rng.normal())
            noise = np.where(rng.random(images) < 0.04, np.inf, pgd / ratio)
            stands = 0.7 + (world.relative if arm in world.raised else 0.0)
            measured[arm, seed] = Decided(
                right=right,
                clean=(known < 0.4 + (world.gain if large else 0.0)) ^ (rng.random(CLEAN) < 0.1),
                under_pgd=right & (rng.random(images) < stands),
                pgd=pgd,
                pgd_ceiling=np.ones(images),
                gaussian=noise,
                gaussian_ceiling=np.full(images, 0.6),
            )
            median = censored_difference(ratio, ratio, 0.95)
            models.append(entry(arm, role, seed, median))
    return measured, models


def heavy(rng, n):
    return rng.standard_t(5, n)


def entry(arm, role, seed, median):
    """The part of a model's results that the rules read."""
    return {
        "name": f"{arm}-s{seed}",
        "title": f"{arm}, seed {seed}",
        "arm": arm,
        "role": role,
        "seed": seed,
        "ratio_median": median,
        "flat_boundary": {"dimensions": 3072, "directions": 4, "ratio": 0.0187},
    }


def counted(question, world, seeds, arms):
    """The verdicts on a question in all simulated studies of a world."""
    rng, settings = np.random.default_rng(0), settings_of(seeds, arms)
    found = Counter()
    for _ in range(STUDIES):
        measured, models = study(rng, world, settings)
        rows = compared(lambda arm, seed, measured=measured: measured[arm, seed], settings)
        found[verdicts(models, rows, [], [], RULES, one_source=True)[question - 1]["verdict"]] += 1
    return found


def within(count, level):
    """Whether so many false verdicts may happen at this level, but for one time in a thousand."""
    return count <= stats.binom.ppf(0.999, STUDIES, level)


def near(count, probability):
    """Whether a count is that of a probability that is itself known from 400 simulated studies."""
    spread = np.sqrt(probability * (1 - probability) * (1 / STUDIES + 1 / power.STUDIES) + 1e-4)
    return abs(count / STUDIES - probability) < 4 * spread


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_ratio_at_the_margin_is_not_called_as_small_as_a_references(seeds):
    found = counted(1, World(ratio=RULES.ratio_margin), seeds, ("softmax", "scratch"))
    assert within(found["supported"], 0.025)
    assert within(found["contradicted"], 0.025)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("ratio", "expected"), [(1.0, "supported"), (1.7, "contradicted")])
def test_the_finding_is_seen_as_often_as_the_power_note_says(seeds, ratio, expected):
    found = counted(1, World(ratio=ratio), seeds, (*REFERENCES, "scratch"))
    both = int(0.4 * IMAGES)
    note = power.ratio_chances(ratio, (both,), len(REFERENCES), seeds, CLEAN, RULES)
    assert near(found[expected], note[both, expected])
    assert not found["contradicted" if expected == "supported" else "supported"]


# As accurate as softmax regression, and more accurate by better training: a ratio as small as its own proves nothing.
@pytest.mark.parametrize("gain", [0.0, 0.03])
@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_a_linear_model_is_never_a_deep_network(gain, ratio):
    found = counted(1, World(ratio=ratio, gain=gain), 1, (*REFERENCES, "scratch"))
    assert found == {"undetermined": STUDIES}


SEEDS = 6


def test_without_an_effect_pre_training_is_not_said_to_raise_robustness():
    found = counted(3, World(), SEEDS, ("scratch", "finetune"))
    assert within(found["supported"], 0.025)
    note = power.rise_chances(1.0, 0.0, SEEDS, IMAGES, 1, RULES)
    assert near(found["contradicted"], note["contradicted"])
    assert found["contradicted"] > 20
    assert found["undetermined"] > 20


def test_a_rise_in_one_measure_alone_is_none():
    # Here the level is reached: one of the two tests always rejects.
    found = counted(3, World(rise=1.4), SEEDS, ("scratch", "finetune"))
    assert within(found["supported"], 0.025)


def test_a_rise_at_the_margin_is_found_as_often_as_the_power_note_says():
    world = World(rise=RULES.distortion_margin, relative=RULES.accuracy_margin)
    found = counted(3, world, SEEDS, ("scratch", "finetune"))
    assert within(found["contradicted"], 0.025)
    note = power.rise_chances(world.rise, world.relative, SEEDS, IMAGES, 1, RULES)
    assert near(found["supported"], note["supported"])


def test_a_rise_that_compute_alone_brings_is_not_that_of_pre_training():
    world = World(rise=1.4, relative=0.15, raised=("finetune", "matched"))
    found = counted(3, world, SEEDS, ("scratch", "matched", "finetune"))
    assert within(found["supported"], 0.025)
    assert found["contradicted"] > 20
    # Without the matched arm the rise is there, and the verdict says that compute was not matched.
    settings = settings_of(SEEDS, ("scratch", "finetune"))
    measured, models = study(np.random.default_rng(0), world, settings)
    rows = compared(lambda arm, seed: measured[arm, seed], settings)
    answer = verdicts(models, rows, [], [], RULES, one_source=True)[2]
    assert answer["verdict"] == "supported"
    assert "Compute was not matched" in answer["because"]


def trajectories(rng, runs, rho, drift=0.0, epochs=(None,), reliability=0.9):
    """Points of question 4: constants correlate with distortions by -rho between runs, and both may drift."""
    r = 2 * np.sin(np.pi * rho / 6)
    found = []
    for arm in ("scratch", "finetune"):
        for seed in range(runs):
            true, shared = rng.normal(size=2)
            for i, epoch in enumerate(epochs):
                moment = drift * (len(epochs) - 1 - i)
                own = np.sqrt(0.5) * shared + np.sqrt(0.5) * rng.normal(size=2)
                sides = -r * true + np.sqrt(1 - r * r) * own - moment
                observed = np.sqrt(reliability) * true + np.sqrt(1 - reliability) * rng.normal() + moment
                found.append(
                    {
                        "run": f"{arm}-s{seed}",
                        "arm": arm,
                        "seed": seed,
                        "epoch": epoch,
                        # Accuracy rises in training, and differs between runs by itself.
                        "accuracy": {"value": 0.6 - 0.05 * moment + 0.01 * rng.normal()},
                        "log10_distortion": -2 + 0.02 * observed,
                        "reliability": reliability,
                        "log10_constant": 12 + 0.1 * sides[0],
                        "log10_stretch": 1 + 0.1 * sides[1],
                        "log10_upper": 12.0,
                    }
                )
    return found


def correlated(rules, *arguments, studies=STUDIES, **options):
    """The verdicts on question 4 in all simulated studies."""
    rng = np.random.default_rng(0)
    return Counter(
        correlation_answer.answer(trajectories(rng, *arguments, **options), {"scratch", "finetune"}, rules).verdict
        for _ in range(studies)
    )


def test_unrelated_constants_are_not_said_to_tell_distortion():
    found = correlated(RULES, 20, 0.0)
    assert within(found["supported"], 0.05)
    assert near(found["contradicted"], power.correlation_chances(0.0, 20, 0.9, RULES)["contradicted"])
    assert found["contradicted"] > 20


def test_a_correlation_is_found_as_often_as_the_power_note_says():
    found = correlated(RULES, 14, RULES.correlation)
    assert near(found["supported"], power.correlation_chances(RULES.correlation, 14, 0.9, RULES)["supported"])
    assert within(found["contradicted"], 0.05)


DRIFTING = {"drift": 2.0, "epochs": (1, 2, 4, None)}


def test_drift_without_relation_is_no_correlation():
    assert within(correlated(RULES, 16, 0.0, **DRIFTING)["supported"], 0.05)
    # What drifts can still be related.
    assert correlated(RULES, 16, 0.9, studies=20, **DRIFTING)["supported"] > 10


def partial_p_values(runs, rho, studies):
    """The p-values of one partial correlation over the snapshots of too few runs, in simulated studies that drift."""
    rules, rng = dataclasses.replace(RULES, min_runs=30, resamples=200), np.random.default_rng(0)
    found = []
    for _ in range(studies):
        rows = trajectories(rng, runs, rho, **DRIFTING)
        (tested, *_) = correlation_answer.answer(rows, {"scratch", "finetune"}, rules).statistics
        assert "partial" in tested["name"]
        found.append(tested["p"])
    return np.array(found)


def test_partial_correlations_of_too_few_runs_keep_their_level_under_drift():
    assert within((partial_p_values(16, 0.0, STUDIES) <= 0.05).sum(), 0.05)
    assert (partial_p_values(16, 0.9, 20) <= 0.05).sum() > 10


# With fewer runs than the rule wants there is no verdict, however lax it is about its power, as the power note says.
@pytest.mark.parametrize(
    ("runs", "changes"), [(4, {}), (5, {}), (5, {"least_power": 0.001}), (8, {"least_power": 0.001, "min_runs": 10})]
)
def test_few_runs_are_answered_as_often_as_the_power_note_says(runs, changes):
    rules = dataclasses.replace(RULES, resamples=200, **changes)
    settings = dataclasses.replace(settings_of(runs, ("scratch", "finetune")), rules=rules)
    found = correlated(rules, runs, 0.95, studies=40, epochs=(1, 2, None), reliability=0.98)
    note = [row["probability"] for row in power.sample_sizes(settings) if row["question"] == 4]
    assert (found, note) == ({"undetermined": 40}, [0.0, 0.0])


# At least six runs are answered where little power is asked for, and as often as the note says.
def test_a_lax_rule_is_answered_as_often_as_the_power_note_says():
    rules = dataclasses.replace(RULES, least_power=0.001)
    settings = dataclasses.replace(settings_of(8, ("scratch", "finetune")), rules=rules)
    note = {row["expected"]: row for row in power.sample_sizes(settings) if row["question"] == 4}
    reliability = float(note["supported"]["assumption"].split()[-1])
    for expected, rho in (("supported", rules.correlation), ("contradicted", 0.0)):
        found = correlated(rules, 8, rho, epochs=(1, None), reliability=reliability)
        assert near(found[expected], note[expected]["probability"])


def test_drift_alone_looks_like_a_correlation_to_who_pools_the_snapshots():
    rows = trajectories(np.random.default_rng(0), 16, 0.0, drift=2.0, epochs=(1, 2, 4, None))
    pooled = stats.spearmanr([p["log10_constant"] for p in rows], [p["log10_distortion"] for p in rows])
    assert pooled.pvalue < 1e-6


def test_six_runs_cannot_answer_whatever_they_show():
    found = correlated(RULES, 6, 0.95)
    assert found == {"undetermined": STUDIES}
