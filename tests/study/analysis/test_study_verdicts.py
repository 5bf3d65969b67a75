"""The rules of the verdicts on synthetic results, with and without the effects that they are to find."""

import numpy as np
import pytest

from fastlip.study.analysis.statistics import proportion
from fastlip.study.analysis.verdicts import QUESTIONS, verdicts
from fastlip.study.settings import presets
from fastlip.study.settings.rules import Rules, rules_in_words
from fastlip.study.settings.training import TRANSFER

RULES = Rules(resamples=500)


def model(arm, seed, *, ratios=(0.01,) * 60):
    """The part of a model's results that the rules read."""
    return {
        "name": f"{arm}-s{seed}",
        "arm": arm,
        "seed": seed,
        "ratio_share": proportion(np.array(ratios) <= RULES.ratio, 0.95),
    }


def verdict(models, number):
    return verdicts(models, [], [], RULES)[number - 1]["verdict"]


@pytest.mark.parametrize(("number", "arm"), [(1, "scratch"), (2, "finetune")])
@pytest.mark.parametrize(
    ("small", "of", "expected"),
    [
        (60, 60, "supported"),
        (36, 36, "supported"),
        (35, 35, "undetermined"),  # 0.025 ** (1 / 35) < 0.9: too few images to say so even if all agree
        (30, 60, "contradicted"),
        (54, 60, "undetermined"),
        (0, 0, "undetermined"),
    ],
)
def test_questions_1_and_2_by_the_share_of_small_ratios(number, arm, small, of, expected):
    models = [model(arm, 0, ratios=[0.05] * small + [0.5] * (of - small))]
    assert verdict(models, number) == expected
    assert verdict(models, 3 - number) == "undetermined"  # the other arm is not there


def test_a_ratio_of_an_image_on_which_nothing_was_found_is_not_small():
    assert verdict([model("scratch", 0, ratios=[np.inf] * 60)], 1) == "contradicted"


def test_seeds_that_disagree_determine_nothing_and_are_said_to():
    models = [model("scratch", 0), model("scratch", 1, ratios=[0.5] * 60)]
    answer = verdicts(models, [], [], RULES)[0]
    assert answer["verdict"] == "undetermined"
    assert "disagree" in answer["because"]


def test_a_seed_that_cannot_be_told_determines_nothing():
    models = [model("scratch", 0), model("scratch", 1, ratios=[0.05] * 54 + [0.5] * 6)]
    answer = verdicts(models, [], [], RULES)[0]
    assert answer["verdict"] == "undetermined"
    assert "interval contains" in answer["because"]


def pairs(seeds, distortion, accuracy):
    """Comparisons of fine-tuned and scratch models that differ by the given amounts with some noise between seeds."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        for measure, value, spread in (
            ("median smallest distortion", distortion, 1e-4),
            ("accuracy under PGD", accuracy, 0.01),
        ):
            difference = estimate(None if value is None else value + spread * rng.normal())
            found.append({"arm": "finetune", "seed": seed, "measure": measure, "difference": difference})
            # Another arm's differences are not read.
            found.append({"arm": "linear", "seed": seed, "measure": measure, "difference": estimate(-1.0)})
    return found


def estimate(value):
    return {"n": 60, "value": value, "low": None, "high": None, "confidence": 0.95}


def pretraining(comparisons):
    return verdicts([], comparisons, [], RULES)[2]


@pytest.mark.parametrize(
    ("seeds", "distortion", "accuracy", "expected"),
    [
        (5, 0.004, 0.2, "supported"),
        (5, -0.004, -0.2, "contradicted"),
        (5, 0.004, -0.2, "undetermined"),
        (5, 0.0, 0.0, "undetermined"),
        (2, 0.004, 0.2, "undetermined"),
        (1, 0.004, 0.2, "undetermined"),
        (0, 0.004, 0.2, "undetermined"),
    ],
)
def test_question_3_by_differences_over_seeds(seeds, distortion, accuracy, expected):
    assert pretraining(pairs(seeds, distortion, accuracy))["verdict"] == expected


def test_one_seed_says_why_it_determines_nothing():
    answer = pretraining(pairs(1, 0.01, 0.2))
    assert "1 of the 3 needed" in answer["because"]
    assert answer["statistics"][0]["estimate"]["low"] is None


def test_declared_comparisons_are_corrected_together():
    statistics = pretraining(pairs(5, 0.004, 0.2))["statistics"]
    first, second = sorted(statistics, key=lambda s: s["p"])
    assert first["p_holm"] == pytest.approx(6 * first["p"])  # the four of question 4 could not be made, and count
    assert second["p_holm"] == pytest.approx(max(5 * second["p"], first["p_holm"]))
    for s in statistics:
        assert (s["estimate"]["low"] > 0) == (s["p_holm"] <= 0.05)


def test_a_seed_whose_median_is_censored_is_not_left_out():
    found = pairs(5, 0.004, 0.2)
    found[0]["difference"] = estimate(None)
    answer = pretraining(found)
    assert answer["verdict"] == "undetermined"
    assert "1 of 5 seeds" in answer["because"]
    assert answer["statistics"][0]["p"] is None


def points(slope, *, runs=12, cases=("scratch", "finetune"), noise=0.1):
    """Runs with two snapshots and an end each, distortion following the constants by ``slope`` plus noise."""
    rng = np.random.default_rng(2)
    found = []
    for arm in cases:
        for seed in range(runs):
            x = rng.normal()
            for epoch in (1, 2, None):
                near = x + 0.05 * rng.normal()
                found.append(
                    {
                        "run": f"{arm}-s{seed}",
                        "arm": arm,
                        "seed": seed,
                        "epoch": epoch,
                        "accuracy": proportion(np.ones(10, dtype=bool), 0.95),
                        "median": 0.1 + 0.01 * (slope * near + noise * rng.normal()),
                        "stretch": 5 + near,
                        "log10_upper": 20 + near,
                    }
                )
    return found


@pytest.mark.parametrize(("slope", "expected"), [(-1, "supported"), (1, "supported"), (0, "undetermined")])
def test_question_4_by_rank_correlation(slope, expected):
    assert verdicts([], [], points(slope, noise=0.1 if slope else 1.0), RULES)[3]["verdict"] == expected


@pytest.mark.slow
def test_six_runs_without_a_correlation_are_hardly_ever_given_one():
    # Both constants follow each other, and the snapshots of a run each other: nothing but the number of runs is left.
    rng = np.random.default_rng(5)
    found = []
    for _ in range(30):
        null = points(0, runs=6, noise=0.0)
        level = {run: rng.normal() for run in sorted({p["run"] for p in null})}
        constant = {run: rng.normal() for run in level}
        for p in null:
            p["median"] = 0.1 + 0.01 * (level[p["run"]] + 0.1 * rng.normal())
            p["log10_upper"], p["stretch"] = 20 + constant[p["run"]], 5 + constant[p["run"]] + 0.1 * rng.normal()
        found.append(verdicts([], [], null, Rules(resamples=400))[3]["verdict"])
    assert found.count("supported") <= 1
    assert found.count("contradicted") == 0


def test_question_4_can_be_contradicted():
    assert verdicts([], [], points(0, runs=400, noise=1.0), RULES)[3]["verdict"] == "contradicted"


def test_question_4_wants_both_cases_to_agree():
    mixed = points(1, cases=("scratch",)) + points(-1, cases=("finetune",))
    assert verdicts([], [], mixed, RULES)[3]["verdict"] == "undetermined"


def test_question_4_counts_runs_and_not_their_snapshots():
    answer = verdicts([], [], points(1, runs=5), RULES)[3]
    assert answer["verdict"] == "undetermined"
    assert "5 from scratch" in answer["because"]


@pytest.mark.parametrize(("small", "of"), [(60, 60), (97, 100)])
def test_a_verdict_says_what_would_change_it(small, of):
    answer = verdicts([model("scratch", 0, ratios=[0.05] * small + [0.5] * (of - small))], [], [], RULES)[0]
    spare = int(answer["change"].split("with ")[1].split()[0])
    for lost, expected in ((spare - 1, "supported"), (spare, "undetermined")):
        left = small - lost
        assert verdict([model("scratch", 0, ratios=[0.05] * left + [0.5] * (of - left))], 1) == expected


def test_rules_state_the_numbers_they_use():
    words = rules_in_words(Rules(ratio=0.2, share=0.8, min_seeds=4, min_runs=9, compared_linf_255=2.0))
    assert len(words) == len(QUESTIONS) == 4
    assert "0.2" in words[0]
    assert "0.8" in words[1]
    assert "4 seeds" in words[2]
    assert "2/255" in words[2]
    assert "9 training runs" in words[3]


def test_the_full_preset_has_as_many_runs_as_the_rules_want():
    full = presets.preset("full")
    assert full.seeds >= full.rules.min_seeds
    assert full.seeds >= full.rules.min_runs  # question 4, from scratch: one arm
    assert full.seeds * len(set(full.arms) & set(TRANSFER)) >= full.rules.min_runs
    assert full.scratch.snapshots
    assert full.finetune.snapshots
