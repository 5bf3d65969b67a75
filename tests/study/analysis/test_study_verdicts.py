"""The rules of the verdicts on synthetic results: what each number decides, and what the answer says."""

import dataclasses
import math
import re

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.answers import fraction
from fastlip.study.analysis.statistics import proportion
from fastlip.study.analysis.verdicts import QUESTIONS, verdicts
from fastlip.study.settings.rules import Rules, rules_in_words
from fastlip.study.settings.training import REFERENCES

RULES = Rules(resamples=200)
MARGIN = math.log(RULES.ratio_margin)


def estimate(value, half=0.0, n=60):
    low, high = (None, None) if value is None else (value - half, value + half)
    return {"n": n, "value": value, "low": low, "high": high, "confidence": 0.95}


def model(arm, seed=0, *, role=None, ratio=0.03):
    """The part of a model's results that the rules read."""
    return {
        "name": f"{arm}-s{seed}",
        "title": f"{arm}, seed {seed}",
        "arm": arm,
        "role": role or ("reference" if arm in REFERENCES else "transfer" if arm == "finetune" else "scratch"),
        "seed": seed,
        "ratio_median": estimate(ratio, 0.001),
        "flat_boundary": {"dimensions": 3072, "directions": 4, "ratio": 0.0187},
    }


def compared(arm, against, measure, values, half=0.01):
    """A comparison of each seed, and of all where there are several."""
    rows = [
        {"arm": arm, "against": against, "seed": i, "measure": measure, "difference": estimate(v, half)}
        for i, v in enumerate(values)
    ]
    if len(values) > 1 and measure in ("log ratio", "clean accuracy"):
        whole = None if None in values else sum(values) / len(values)
        rows.append(rows[0] | {"seed": None, "difference": estimate(whole, half)})
    return rows


def asked(models, comparisons=(), points=(), transfer=(), rules=RULES, one_source=True):
    return verdicts(models, list(comparisons), list(points), list(transfer), rules, one_source=one_source)


def ratios(differences, gain=0.2, *, half=0.05, seeds=1, arm="scratch", references=REFERENCES, rules=RULES):
    """The answer to question 1 or 2 with these differences of log ratios from each reference."""
    models = [model(a, k) for a in (*references, arm) for k in range(seeds)]
    rows = compared(arm, "softmax", "clean accuracy", [gain] * seeds)
    for name, d in zip(references, differences, strict=True):
        rows += compared(arm, name, "log ratio", [d] * seeds, half)
    return asked(models, rows, rules=rules)[1 if arm == "finetune" else 0]


@pytest.mark.parametrize("arm", ["scratch", "finetune"])
@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], "supported"),
        ([-3.0, 0.1, 0.0, -1.0], "supported"),
        ([0.0, 0.0, 0.0, MARGIN - 0.04], "undetermined"),  # one upper limit is above the margin
        ([0.0, 0.0, 0.0, 1.0], "undetermined"),
        ([1.0, 1.0, 1.0, 0.3], "contradicted"),
        ([1.0, 1.0, 1.0, MARGIN + 0.04], "undetermined"),
        ([0.0, 0.0, 0.0, None], "undetermined"),
    ],
)
def test_questions_1_and_2_by_the_limits_beside_every_reference(arm, differences, expected):
    assert ratios(differences, arm=arm)["verdict"] == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.07, "supported"), (0.055, "undetermined"), (-0.3, "undetermined")])
def test_only_what_is_more_than_a_linear_model_speaks_about_deep_networks(gain, expected):
    for differences in ([0.0] * 4, [1.0] * 4):
        answer = ratios(differences, gain)
        assert answer["verdict"] == (expected if differences[0] == 0 or expected == "undetermined" else "contradicted")
        assert ("linear model" in answer["headline"]) == (expected == "undetermined")


@pytest.mark.parametrize(
    ("gain", "seen"),
    [
        (
            -0.404,
            "clean accuracy is 40.4 points below that of softmax regression (lower limit: 41.4 points below),",
        ),
        (
            0.004,
            "clean accuracy is 0.4 points above that of softmax regression (lower limit: 0.6 points below),",
        ),
        (
            0.055,
            "clean accuracy is 5.5 points above that of softmax regression (lower limit: 4.5 points above),",
        ),
        (None, "How much more accurate the network is than softmax regression is not known,"),
    ],
)
def test_a_gain_that_is_too_small_is_said_without_a_sign(gain, seen):
    assert seen in ratios([0.0] * 4, gain)["because"]


@pytest.mark.parametrize("sign", [-1, 1])
def test_no_sentence_holds_a_negative_number(sign):
    """A reader of "-40.4 points more" has to do the sum; only correlations have signs."""
    answers = [ratios([sign * 0.5] * 4, sign * gain) for gain in (0.3, 0.04)]
    answers += [
        rises(sign * a, sign * b, seeds=n, matched=(-a, -b)) for a, b in ((0.3, 0.2), (0.01, 0.004)) for n in (2, 5)
    ]
    for answer in answers:
        assert not re.search(r"(?<!\w)[-\u2212]\d", " ".join((answer["headline"], answer["because"], answer["change"])))
    words = ("more", "less") if sign > 0 else ("less", "more")
    first, second = (rises(s * sign * 0.3, s * sign * 0.2)["headline"] for s in (1, -1))
    assert f"keeps 20.0 points {words[0]} of its accuracy under attack" in first
    assert f"keeps 20.0 points {words[1]} of its accuracy under attack" in second


def test_without_softmax_regression_the_question_says_which_arms_to_add():
    answer = ratios([0.0], references=("resnet18",))
    assert answer["verdict"] == "undetermined"
    assert answer["change"] == "Add the arms softmax, mlp and convnet."
    alone = asked([model("scratch")])[0]
    assert alone["verdict"] == "undetermined"
    assert alone["change"] == "Add the arms softmax, mlp, convnet and resnet18."
    assert "a flat boundary alone makes them small" in alone["because"]


def test_the_other_arm_is_not_asked_about():
    answer = asked([model("scratch")])[1]
    assert (answer["verdict"], answer["change"]) == ("undetermined", "Train the arm finetune.")


def test_the_headline_says_the_ratios_as_a_person_would():
    models = [model("scratch", ratio=0.0333), model("softmax", ratio=0.0294), model("mlp", ratio=0.5)]
    models[0]["title"] = "ResNet-50, from scratch, seed 0"
    rows = [r for name in ("softmax", "mlp") for r in compared("scratch", name, "log ratio", [0.0])]
    answer = asked(models, rows + compared("scratch", "softmax", "clean accuracy", [0.2]))[0]
    assert answer["headline"] == (
        "ResNet-50 (from scratch) is fooled by a thirtieth of the noise it withstands; softmax regression by a "
        "thirty-fourth of it and the two-layer perceptron by half of it."
    )


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1 / 3, "a third of"),
        (1 / 8, "an eighth of"),
        (1 / 11, "an eleventh of"),
        (1 / 20, "a twentieth of"),
        (1 / 81, "an eighty-first of"),
        (0.001, "1/1000 of"),
        (0.52, "half of"),
        (0.66, "0.66 times"),
        (0.4, "0.4 times"),
        (0.9, "0.9 times"),
        (3.0, "3 times"),
    ],
)
def test_fractions_in_words(ratio, words):
    assert fraction(ratio) == words


@pytest.mark.parametrize(("ratio", "what"), [(None, "a perturbation"), (0.0, "noise of any strength")])
def test_a_ratio_that_is_not_known_is_not_made_up(ratio, what):
    answer = asked([model("scratch", 0), model("scratch", 1, ratio=ratio)])[0]
    assert answer["headline"].startswith(f"Scratch: {what} that changes the decision was found for less than half")
    assert answer["statistics"][0]["estimate"]["value"] == ratio


def test_from_three_seeds_on_the_seeds_must_agree_too():
    # Every image counts once in the narrow interval of all seeds, but the seeds are far apart.
    models = [model(a, k) for a in ("softmax", "scratch") for k in range(3)]
    gain = compared("scratch", "softmax", "clean accuracy", [0.2] * 3)
    for spread, expected in ((0.01, "supported"), (0.2, "undetermined")):
        rows = compared("scratch", "softmax", "log ratio", [-spread, 0.0, spread])
        answer = asked(models, rows + gain)[0]
        assert answer["verdict"] == expected
        assert "over 3 seeds" in answer["because"]
    two = [m for m in models if m["seed"] < 2]
    rows = compared("scratch", "softmax", "log ratio", [-0.2, 0.2])
    answer = asked(two, rows + compared("scratch", "softmax", "clean accuracy", [0.2] * 2))[0]
    assert answer["verdict"] == "supported"
    assert "about these 2 models" in answer["because"]


def test_transfer_and_the_flat_boundary_stand_beside_the_ratios_untested():
    def row(source, disjoint, fooled, noise):
        one, other = (proportion(np.arange(50) < k, 0.95) for k in (fooled, noise))
        who = {"source": source, "target": "scratch-s0", "strength": 0.5, "disjoint": disjoint}
        return who | {"fooled": one, "noise": other}

    rows = [row("mlp-s0", False, 20, 1), row("softmax-s0", False, 10, 3), row("disjoint-s0", True, 5, 2)]
    rows += [row("scratch-s0", False, 50, 2)]  # its own examples are no transfer
    statistics = asked([model("scratch")], transfer=rows)[0]["statistics"]
    values = {s["name"]: s["estimate"]["value"] for s in statistics}
    assert values["ratio of a flat boundary in 3,072 dimensions with 4 directions (predicted)"] == 0.0187
    assert values["share fooled by perturbations made for other models, L2 norm 0.5"] == pytest.approx(0.3)
    assert values["share fooled by noise of the same norm, beside other models, L2 norm 0.5"] == pytest.approx(0.04)
    assert values["share fooled by perturbations made for models trained on disjoint images, L2 norm 0.5"] == 0.1
    assert all(s["p"] is None for s in statistics)


def rises(distortion, accuracy, *, seeds=5, spread=0.005, matched=None, **options):
    """The answer to question 3 with these mean differences from scratch, and from the matched arm if it is there."""
    wave = spread * np.resize([-1.0, 1.0, 0.5, -0.5, 0.0], seeds)
    baselines = {"scratch": (distortion, accuracy)} | ({} if matched is None else {"matched": matched})
    models = [model(arm, k) for arm in (*baselines, "finetune") for k in range(seeds)]
    rows = []
    for name, (d, a) in baselines.items():
        distances = [None if d is None else float(d + w) for w in wave]
        rows += compared("finetune", name, "log smallest distortion", distances)
        rows += compared("finetune", name, "relative accuracy under PGD", [float(a + w) for w in wave])
        rows += compared("linear", name, "log smallest distortion", [-1.0] * seeds)  # another arm is not read
    return asked(models, rows, **options)[2]


@pytest.mark.parametrize(
    ("distortion", "accuracy", "expected"),
    [
        (0.3, 0.2, "supported"),
        (0.05, 0.02, "supported"),
        (-0.3, -0.2, "contradicted"),
        (0.0, 0.0, "contradicted"),
        (0.3, 0.0, "undetermined"),
        (0.0, 0.2, "undetermined"),
        (-0.3, 0.2, "undetermined"),
        (None, 0.2, "undetermined"),
    ],
)
def test_question_3_by_both_differences_over_seeds(distortion, accuracy, expected):
    assert rises(distortion, accuracy)["verdict"] == expected


def test_wide_intervals_determine_nothing():
    assert rises(0.05, 0.02, spread=0.2)["verdict"] == "undetermined"


@pytest.mark.parametrize(
    ("matched", "expected"), [((0.3, 0.2), "supported"), ((0.0, 0.0), "contradicted"), ((0.3, 0.0), "undetermined")]
)
def test_compute_matched_scratch_must_be_surpassed_too(matched, expected):
    answer = rises(0.3, 0.2, matched=matched)
    assert answer["verdict"] == expected
    assert "Compute was not matched" not in answer["because"]
    assert "with the same compute" in answer["headline"]
    assert len(answer["statistics"]) == 4


def test_what_the_claim_is_about_is_said():
    assert "All seeds share one source" in rises(0.3, 0.2)["because"]
    assert "All seeds share one source" not in rises(0.3, 0.2, one_source=False)["because"]
    assert "Compute was not matched" in rises(0.3, 0.2)["because"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_say_why_they_determine_nothing(seeds):
    answer = rises(0.3, 0.2, seeds=seeds)
    assert answer["verdict"] == "undetermined"
    assert f"{seeds} of the 3 needed" in answer["because"]
    assert answer["statistics"][0]["p"] is None


def test_question_3_states_students_test():
    answer = rises(0.05, 0.02, spread=0.1)
    values = 0.05 + 0.1 * np.array([-1.0, 1.0, 0.5, -0.5, 0.0])
    assert answer["statistics"][0]["p"] == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert answer["headline"].startswith("The fine-tuned network takes 1.05 times as much perturbation to fool")


def points(slope, *, runs=16, arms=("scratch", "finetune"), noise=0.1, reliability=0.9, epochs=(None,)):
    """Runs whose distortion follows their constants by ``slope`` plus noise."""
    rng = np.random.default_rng(2)
    found = []
    for arm in arms:
        for seed in range(runs):
            x = rng.normal()
            for epoch in epochs:
                near = x + 0.05 * rng.normal()
                found.append(
                    {
                        "run": f"{arm}-s{seed}",
                        "arm": arm,
                        "seed": seed,
                        "epoch": epoch,
                        "accuracy": {"value": 0.5 + 0.01 * rng.normal()},
                        "log10_distortion": -2 + 0.01 * (slope * near + noise * rng.normal()),
                        "reliability": reliability,
                        "log10_constant": 12 + near,
                        "log10_stretch": 1 + near,
                        "log10_upper": 13 + rng.normal(),
                    }
                )
    return found


LARGE = [model("scratch"), model("finetune")]


def correlation(rows, rules=RULES):
    return asked(LARGE, points=rows, rules=rules)[3]


@pytest.mark.parametrize(("slope", "words"), [(-1.0, "withstand less"), (1.0, "withstand more")])
def test_question_4_by_rank_correlation(slope, words):
    answer = correlation(points(slope))
    assert answer["verdict"] == "supported"
    assert words in answer["headline"]
    assert all(s["p"] <= 0.05 for s in answer["statistics"] if "rank" in s["name"])


def test_unrelated_runs_contradict_where_there_are_enough():
    assert correlation(points(0.0, runs=60, noise=1.0))["verdict"] == "contradicted"
    assert correlation(points(0.8, runs=14, noise=1.0))["verdict"] == "undetermined"


def test_question_4_wants_both_arms_to_agree():
    mixed = points(1.0, arms=("scratch",)) + points(-1.0, arms=("finetune",))
    assert correlation(mixed)["verdict"] == "undetermined"


def test_arms_are_never_pooled():
    # In each arm nothing is related; the arms differ in both.
    rows = points(0.0, runs=14, noise=1.0)
    for p in rows:
        if p["arm"] == "finetune":
            p["log10_constant"] += 10
            p["log10_stretch"] += 10
            p["log10_distortion"] += 1
    answer = correlation(rows)
    assert answer["verdict"] != "supported"
    assert all(abs(s["estimate"]["value"]) < 0.6 for s in answer["statistics"] if "rank" in s["name"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runs": 5}, "An arm has 5 runs where the rule needs 6"),
        ({"runs": 1}, "An arm has 1 run where the rule needs 6"),
        ({"runs": 6}, "With 6 runs of an arm and distortions of reliability 0.90"),
        ({"reliability": 0.2}, "reliability 0.20"),
        ({"reliability": None}, "unknown reliability"),
    ],
)
def test_question_4_says_where_it_cannot_be_answered(changes, reason):
    answer = correlation(points(-1.0, **changes))
    assert answer["verdict"] == "undetermined"
    assert reason in answer["because"]
    assert answer["headline"].startswith("These runs cannot say")


def test_final_models_alone_count_where_there_are_enough():
    # The snapshots would turn the sign around.
    rows = points(-1.0) + [p | {"epoch": 1, "log10_distortion": 5 + p["log10_constant"]} for p in points(1.0)]
    answer = correlation(rows)
    assert answer["verdict"] == "supported"
    assert "(16 points)" in answer["statistics"][0]["name"]


def test_with_fewer_runs_their_snapshots_are_correlated_partially():
    answer = correlation(points(-1.0, runs=5, epochs=(1, 2, None)))
    assert "partial on epoch and accuracy (15 points)" in answer["statistics"][0]["name"]
    assert answer["statistics"][0]["estimate"]["n"] == 5


def test_a_run_without_a_number_is_not_left_out():
    rows = points(-1.0)
    rows[0]["log10_stretch"] = None
    answer = correlation(rows)
    assert answer["verdict"] == "undetermined"
    values = {s["name"]: s["estimate"]["value"] for s in answer["statistics"] if "scratch: rank" in s["name"]}
    assert [value is None for value in values.values()] == [False, True]


def test_other_arms_are_stated_and_decide_nothing():
    rows = points(-1.0) + points(1.0, arms=("linear",))
    answer = asked([*LARGE, model("linear", role="transfer")], points=rows)[3]
    assert answer["verdict"] == "supported"
    assert any(s["name"].startswith("linear: rank") for s in answer["statistics"])


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_bounded_norms_are_stated_beside_question_4_and_decide_nothing(slope):
    rows = points(-1.0) + points(slope, arms=("constrained",))
    without, answer = (asked(models, points=rows)[3] for models in (LARGE, [*LARGE, model("constrained")]))
    assert answer["verdict"] == without["verdict"] == "supported"
    assert answer["headline"] == without["headline"]
    beside = answer["because"].removeprefix(without["because"])
    sign = "-" if slope < 0 else "+"
    numbers = re.findall(r"([+-])0\.\d\d \((.+?)\)", beside)
    assert [s for s, _ in numbers] == [sign, sign]
    assert [side for _, side in numbers] == [
        "certified constant over median margin",
        "largest observed stretch over median margin",
    ]
    assert "Beside the verdict" in beside
    assert "over 16 runs" in beside


def test_few_runs_with_bounded_norms_are_in_the_statistics_alone():
    rows = points(-1.0) + points(-1.0, arms=("constrained",), runs=3)
    answer = asked([*LARGE, model("constrained")], points=rows)[3]
    assert "bounded" not in answer["because"]
    assert any(s["name"].startswith("constrained: rank") for s in answer["statistics"])


def test_bounded_norms_leave_questions_1_to_3_as_they_are():
    """Among what is stated beside questions 1 and 2, too: perturbations made for such a network."""

    def row(source, target, fooled):
        share = {"n": 100, "k": fooled, "value": fooled / 100}
        return {
            "source": source,
            "target": target,
            "strength": 1.0,
            "disjoint": False,
            "fooled": share,
            "noise": share,
        }

    arms = ("scratch", "finetune", "softmax")
    models = [model(arm) for arm in arms[:2]] + [model("softmax", role="reference")]
    names = {m["arm"]: m["name"] for m in models}
    rows = [row(names[a], names[b], 30) for a in arms for b in arms]
    bounded = model("constrained")
    more = rows + [row(bounded["name"], name, 90) for name in names.values()]
    more += [row(name, bounded["name"], 80) for name in names.values()]
    without, answers = asked(models, transfer=rows), asked([*models, bounded], transfer=more)
    assert any("fooled by perturbations" in s["name"] for s in without[0]["statistics"])
    assert answers[:3] == without[:3]


def test_checkpoints_are_not_asked_about():
    answers = asked([model("mine", role="checkpoint"), model("yours", role="checkpoint")])
    assert {a["verdict"] for a in answers} == {"undetermined"}
    assert all("the questions are about arms" in a["because"] for a in answers)


def test_rules_state_the_numbers_they_use():
    default = rules_in_words(Rules())
    changes = {
        "ratio_margin": (1.5, [0, 1]),
        "nonlinear_gain": (0.07, [0, 1]),
        "compared_linf_255": (2.0, [2, 3]),
        "distortion_margin": (1.3, [2]),
        "accuracy_margin": (0.08, [2]),
        "min_seeds": (4, [0, 1, 2]),
        "min_runs": (9, [3]),
        "correlation": (0.7, [3]),
        "least_power": (0.6, [3]),
        "confidence": (0.9, [0, 1, 2, 3]),
    }
    for name, (value, where) in changes.items():
        words = rules_in_words(dataclasses.replace(Rules(), **{name: value}))
        assert [i for i in range(4) if words[i] != default[i]] == where, name
    assert len(default) == len(QUESTIONS) == 4
