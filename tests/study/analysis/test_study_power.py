"""The power note: its rows, its determinism, and its agreement with closed forms where there are any."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis import power
from fastlip.study.settings import presets
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.training import REFERENCES
from fastlip.study.storage.schema import Power

RULES = Rules()


@pytest.fixture(scope="module")
def full():
    return dataclasses.replace(presets.preset("full"), arms=(*REFERENCES, "scratch", "finetune"), seeds=2)


def by_question(settings):
    found = {}
    for row in power.sample_sizes(settings):
        found.setdefault(row["question"], []).append(row)
    return found


def test_the_note_asks_for_both_answers_to_every_question(full, conforms):
    found = by_question(full)
    for rows in found.values():
        assert {row["expected"] for row in rows} == {"supported", "contradicted"}
        for row in rows:
            conforms(row, Power)
            assert row["had"] is None
            assert 0 <= row["probability"] <= 1
    assert sorted(found) == [1, 2, 3, 4]


def test_the_note_is_the_same_every_time(full):
    before = power.sample_sizes(full)
    for function in (power.ratio_chances, power.correlation_chances):
        function.cache_clear()
    assert power.sample_sizes(full) == before


def test_an_arm_that_is_missing_is_named_and_leaves_its_question_open(full):
    found = by_question(dataclasses.replace(full, arms=("scratch",)))
    for question, named in ((1, "softmax"), (2, "finetune"), (3, "finetune"), (4, "finetune")):
        (row,) = found[question]
        assert named in row["assumption"]
        assert (row["expected"], row["needed"], row["probability"]) == ("undetermined", None, 1.0)


def test_checkpoints_have_no_power_note(full):
    assert power.sample_sizes(dataclasses.replace(full, arms=(), seeds=1, checkpoints=("a", "b"))) == []


def test_what_is_needed_reaches_the_power_wanted_and_less_does_not(full):
    rows = by_question(full)[3]
    for row, (factor, accuracy) in zip(rows, ((1.1, 0.05), (1.21, 0.1), (1.0, 0.0)), strict=True):
        chance = {
            n: power.rise_chances(factor, accuracy, n, full.evaluation.images, 1, RULES)[row["expected"]]
            for n in (row["needed"] - 1, row["needed"])
        }
        assert chance[row["needed"]] >= RULES.power
        assert chance[row["needed"] - 1] < RULES.power or row["needed"] == RULES.min_seeds


@pytest.mark.parametrize("seeds", [3, 6, 10])
def test_the_chance_of_question_3_lies_between_the_bounds_of_two_t_tests(seeds):
    found = power.rise_chances(1.1, 0.05, seeds, 400, 1, RULES)["supported"]
    spread = np.hypot((0.03, 0.01), (0.076, 0.032))
    effect = np.array([math.log(1.1), 0.05]) / spread * math.sqrt(seeds)
    single = stats.nct.sf(stats.t.isf(0.025, seeds - 1), seeds - 1, effect)
    slack = 4 * math.sqrt(0.25 / power.STUDIES)
    assert single.prod() - slack < found < single.min() + slack


def test_more_images_seeds_and_runs_raise_the_chances():
    ratio = power.ratio_chances(1.0, (50, 400), 4, 1, 5000, RULES)
    assert ratio[50, "supported"] < ratio[400, "supported"]
    assert (
        power.rise_chances(1.1, 0.05, 4, 400, 1, RULES)["supported"]
        < power.rise_chances(1.1, 0.05, 12, 400, 1, RULES)["supported"]
    )
    few, many, reliable = (power.correlation_chances(0.8, n, r, RULES) for n, r in ((8, 0.5), (30, 0.5), (30, 1.0)))
    assert few["supported"] < many["supported"] < reliable["supported"]


def test_a_second_baseline_lowers_the_chance_of_question_3():
    one, two = (power.rise_chances(1.1, 0.05, 8, 400, baselines, RULES)["supported"] for baselines in (1, 2))
    assert two < one


def test_runs_that_cannot_answer_give_neither_verdict(full):
    for row in by_question(full)[4]:
        assert row["probability"] == 0
    needed = {row["expected"]: row["needed"] for row in by_question(full)[4]}
    assert power.chance_to_find(needed["contradicted"], 0.55, RULES) >= RULES.least_power


@pytest.mark.parametrize(("runs", "reliability"), [(5, 1.0), (20, 0.0), (20, math.nan)])
def test_what_measures_nothing_finds_nothing(runs, reliability):
    assert power.chance_to_find(runs, reliability, RULES) == 0


def test_what_no_size_reaches_is_not_needed():
    assert power._least((1, 2, 3), lambda n: 0.1 * n, 0.8) is None
    assert power._least((1, 2, 3), lambda n: 0.4 * n, 0.8) == 2
