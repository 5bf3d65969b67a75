import csv
import io
import math
import re

import numpy as np
import pytest
from scipy import stats

from fastlip.study.analysis.statistics import proportion
from fastlip.study.report.attack_tables import corrupted_table, transfer_table
from fastlip.study.report.depth_figures import operator
from fastlip.study.report.difference_table import MEASURES, difference_table
from fastlip.study.report.number_format import confidence, distortion, factor, interval, number, percent, power
from fastlip.study.report.spectra_figures import profile_figure, weight_figure
from fastlip.study.report.summary_tables import arm_table, seed_by_seed_table, seed_table
from fastlip.study.report.tables import Table
from fastlip.study.storage.schema import Estimate


@pytest.mark.parametrize("log10", [-7.3, -0.2, 0.0, 1.9566, 3.9999, 4.0, 28.5012, 120.7])
def test_a_bound_is_rounded_upwards_and_by_less_than_two_percent(log10):
    shown = math.log10(float(power(log10)))
    assert 0 <= shown - log10 + 1e-12 < math.log10(1.02)


@pytest.mark.parametrize(
    ("risk", "shown"), [(1.43e-7, "2e-07"), (1e-6, "1e-06"), (5e-7, "5e-07"), (9.5e-7, "1e-06"), (0.05, "5e-02")]
)
def test_no_more_confidence_is_shown_than_there_is(risk, shown):
    assert confidence(1 - risk) == f"1 − {shown}"
    assert confidence(1.0) == "1"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0"), (0.0012345, "0.00123"), (12.345, "12.3"), (1234.5, "1234"), (1.5e-9, "1.50e-09")],
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def estimate(value, low, high, n=4):
    return Estimate(n=n, value=value, low=low, high=high, confidence=0.95)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (estimate(0.5, 0.25, 1.0), "50.0 [25.0, 100] (n = 4)"),
        (estimate(0.5, 0.25, None), "50.0 [25.0, –] (n = 4)"),
        (estimate(0.5, None, None), "50.0 (n = 4)"),
        (estimate(None, None, None, 0), "does not exist (n = 0)"),
    ],
)
def test_intervals_show_what_exists(given, shown):
    assert interval(given, 100) == shown


def test_a_rate_shows_its_interval_and_size():
    assert percent(proportion(np.arange(96) < 90, 0.95)) == "93.8% [86.9%, 97.7%] (n = 96)"
    assert percent(proportion(np.zeros(0, dtype=bool), 0.95)) == "none (n = 0)"


def test_cells_survive_each_format():
    table = Table(
        "t", "title", ("A|B", "C & D_1"), (("50% − ε", 'say "x", y'), ("*a* `b` <i>", "[l](u) &amp; _x_")), "n"
    )
    assert list(csv.reader(io.StringIO(table.csv()))) == [list(table.header), *map(list, table.rows)]
    markdown = table.markdown()
    assert re.search(r"^\| A\\\|B +\| C & D_1 +\|$", markdown, re.MULTILINE)
    assert r"\*a\* \`b\` \<i>" in markdown
    assert r"\[l](u) \&amp; \_x\_" in markdown
    assert r"C \& D\_1 \tabularnewline" in table.latex()
    assert r"50\% $-$ $\varepsilon$" in table.latex()


def test_intervals_are_no_links_in_markdown():
    table = Table("t", "title", ("A",), (("40.0 [35.0, 45.4] (n = 103)",),), "n")
    assert "| 40.0 [35.0, 45.4] (n = 103) |" in table.markdown()


def test_a_difference_of_logarithms_is_shown_as_a_factor():
    assert factor(estimate(math.log(2), 0.0, math.log(4), 95)) == "× 2.00 [1.00, 4.00] (n = 95)"
    assert factor(estimate(None, None, None, 0)) == "does not exist (n = 0)"
    assert factor(estimate(5000.0, None, None)).startswith("× inf")


def test_the_seed_table_has_the_stretch_of_each_attack_beside_the_certified_constant(synthetic):
    results = synthetic(0, ("scratch",)).results()
    m = results["models"][0]
    rows = seed_table(results).rows
    assert [row[1] for row in rows] == ["Gaussian", "PGD", *(deck["attack"] for deck in results["seed_deck"])]
    for row, s in zip(rows, (m["smallest_gaussian"], m["smallest_pgd"]), strict=False):
        stretch, depth = s["stretch"], s["depth"]
        assert row[4] == f"{number(stretch['mean']['value'])}, largest {number(stretch['largest'])}"
        least, most, largest = min(depth["mean"]), max(depth["mean"]), max(depth["largest"])
        assert row[5] == f"{number(least)}–{number(most)}, largest {number(largest)}"
        assert row[6].startswith(power(m["lipschitz"]["log10_upper"]))
        assert row[2] == distortion(s["mean"])
        assert row[3] == f"{s['found']['k'] / s['found']['n']:.0%}; {number(s['mean_with_ceiling']['value'], 255)}"


def test_the_sample_size_of_the_deck_is_named_an_inference(synthetic):
    table = seed_table(synthetic().results())
    assert all("(n = 96 is inferred)" in row[-1] for row in table.rows[-4:])
    assert "3,326 of the sample sizes up to 10,000" in table.notes
    # Numbers of images of which both accuracies of the deck can be shares, to two decimals of a per cent.
    fits = [n for n in range(1, 10_001) if all(rounds_to(n, percent) for percent in ("93.75", "88.54"))]
    assert 96 in fits
    assert len(fits) == 3326


def rounds_to(n, wanted):
    near = round(n * float(wanted) / 100)
    return any(f"{100 * k / n:.2f}" == wanted for k in (near - 1, near, near + 1))


def test_seeds_are_folded_into_one_row_for_each_arm_and_attack(synthetic):
    one, three = (synthetic(0, ("scratch", "finetune"), seeds=seeds).results() for seeds in (1, 3))
    assert seed_by_seed_table(one).rows == ()
    assert len(seed_table(one).rows) == len(seed_table(three).rows) == 8
    assert len(seed_by_seed_table(three).rows) == 12
    means = [m["smallest_pgd"]["mean"]["value"] for m in three["models"] if m["arm"] == "scratch"]
    (row,) = [row for row in seed_table(three).rows if row[:2] == ("from scratch (3 seeds)", "PGD")]
    assert row[2].startswith(number(255 * float(np.mean(means))) + " [")
    assert row[2].endswith("(n = 3)")


def test_a_mean_that_a_seed_lacks_is_not_taken_over_the_others(synthetic):
    results = synthetic(0, ("scratch",), seeds=3).results()
    results["models"][1]["smallest_pgd"]["mean"]["value"] = None
    results["models"][1]["smallest_pgd"]["mean_with_ceiling"]["value"] = None
    row = seed_table(results).rows[1]
    assert row[2] == "does not exist (n = 0)"
    assert row[3].endswith("; –")


def test_transfer_is_a_cross_table(synthetic):
    results = synthetic(0, ("scratch", "disjoint")).results()
    table = transfer_table(results)
    names = [m["title"] for m in results["models"]]
    assert table.header == ("Made for", "L2 Norm", *(f"Judged by {name}" for name in names))
    for t in results["transfer"]:
        source, target = (names[[m["name"] for m in results["models"]].index(t[end])] for end in ("source", "target"))
        (row,) = [row for row in table.rows if row[:2] == (source, f"{t['strength']:g}")]
        cell = row[2 + names.index(target)]
        assert cell == f"{t['fooled']['value']:.0%} / {t['noise']['value']:.0%}{' †' if t['disjoint'] else ''}"


def test_transfer_between_many_models_is_shown_between_arms(synthetic):
    results = synthetic(0, ("scratch", "finetune"), seeds=5).results()
    table = transfer_table(results)
    assert table.header[2:] == ("Judged by from scratch", "Judged by fine-tuned")
    arm = {m["name"]: m["arm"] for m in results["models"]}
    for column, target in ((2, "scratch"), (3, "finetune")):
        pairs = [
            t["fooled"]["value"]
            for t in results["transfer"]
            if (arm[t["source"]], arm[t["target"]], t["strength"]) == ("scratch", target, 0.5)
            and t["source"] != t["target"]
        ]
        assert len(pairs) == (20 if target == "scratch" else 25)
        assert table.rows[0][column].startswith(f"{np.mean(pairs):.0%} / ")


def test_distortion_under_corruptions_has_a_table(synthetic):
    results = synthetic().results()
    table = corrupted_table(results)
    assert table.header == ("Corruption", "Severity 1", "Severity 3", "Severity 5")
    found = results["models"][0]["corruptions"]["rows"]
    assert dict(zip([r[0] for r in table.rows], [r[1:] for r in table.rows], strict=True)) == {
        name: tuple(number(c["distortion"]["value"], 255) for c in found if c["corruption"] == name)
        for name in ("gaussian_noise", "jpeg_compression", "contrast")
    }


def test_differences_of_all_seeds_stand_above_those_of_each(synthetic):
    results = synthetic(0, ("softmax", "scratch", "finetune"), seeds=3).results()
    rows = difference_table(results).rows
    chosen = [
        row for row in rows if row[:2] == ("fine-tuned against from scratch", MEASURES["log smallest distortion"])
    ]
    assert [row[2] for row in chosen] == ["all", "0", "1", "2"]
    values = [c["difference"]["value"] for c in results["comparisons"] if c["measure"] == "log smallest distortion"]
    assert chosen[0][3].startswith(f"× {math.exp(np.mean(values)):.2f} [")
    # Where the results have one for all seeds together, that is shown.
    (together,) = [
        c["difference"]
        for c in results["comparisons"]
        if (c["arm"], c["seed"], c["measure"]) == ("scratch", None, "log ratio")
    ]
    chosen = [row for row in rows if row[:2] == ("from scratch against softmax regression", MEASURES["log ratio"])]
    assert chosen[0][2:] == ("all", factor(together))
    assert len(chosen) == 4


@pytest.mark.parametrize("table", [arm_table, seed_table, difference_table])
def test_means_over_seeds_with_different_bounds_are_called_so(synthetic, table):
    arms = ("softmax", "scratch", "constrained", "finetune")
    (one, three, usual) = (
        table(synthetic(0, names, seeds=seeds).results()).notes
        for names, seeds in ((arms, 1), (arms, 3), (arms[:2], 3))
    )
    said = "The seeds of “scratch, norms bounded” have different bounds, and its means are over these too."
    assert [said in note for note in (one, three, usual)] == [False, True, False]


def test_arms_are_summed_up_over_seeds(synthetic):
    results = synthetic(0, ("scratch", "finetune"), seeds=3).results()
    assert arm_table(synthetic().results()).rows == (), "one seed has no spread"
    shares = {"scratch": [0.5, 0.7, 0.6], "finetune": [0.8, 0.8, 0.8]}
    for model in results["models"]:
        model["clean"]["value"] = shares[model["arm"]][model["seed"]]
        if model["name"] == "scratch-s1":
            model["smallest_pgd"]["median"]["value"] = None
    table = arm_table(results)
    assert table.header == ("Measure", "from scratch", "fine-tuned")
    rows = {row[0]: row[1:] for row in table.rows}
    low, high = stats.t.interval(0.95, 2, 60.0, stats.sem([50.0, 70.0, 60.0]))
    assert rows["clean accuracy, %"] == (f"60.0 [{low:.1f}, {high:.1f}] (n = 3)", "80.0 [80.0, 80.0] (n = 3)")
    # A median that does not exist in one seed is not left out of the mean.
    assert rows["median smallest PGD distortion × 255"][0] == "does not exist (n = 0)"
    assert len([name for name in rows if name.startswith("accuracy, PGD")]) == 5


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("Conv2d 3→64 7×7 /2×2 on 32×32 + BN", "Conv2d 7×7"),
        ("Conv2d 64→256 1×1 on 8×8 + BN", "Conv2d 1×1"),
        ("Linear 2048→10", "Linear"),
        ("Linear 2048→10 on 4", "Linear"),
        ("", ""),
    ],
)
def test_the_kind_of_a_layer(kind, shown):
    assert operator(kind) == shown


@pytest.mark.parametrize(
    ("arm", "ends"),
    [
        ("scratch", ("network.layer0.conv", "network.layer9.conv")),  # every third is 3x3, 1x1, 7x7
        ("softmax", ("network.head", "network.head")),
    ],
)
def test_profiles_are_of_the_first_and_last_wide_convolution_or_weight(synthetic, arm, ends):
    rows = csv.DictReader(io.StringIO(profile_figure(synthetic(0, (arm,)).results()).csv))
    assert list(dict.fromkeys(row["layer"] for row in rows)) == list(dict.fromkeys(ends))


@pytest.mark.parametrize("dead", [0.0, 8 / 9])
def test_dead_taps_are_named(synthetic, dead):
    results = synthetic(0, ("scratch",)).results()
    for i, weight in enumerate(results["models"][0]["weights"]):
        weight["dead_taps"] = dead if i == 3 else 0.0
    figure = weight_figure(results)
    assert ("DEAD: up to 89% of a kernel" in figure.caption) == (dead > 0)
    rows = list(csv.DictReader(io.StringIO(figure.csv)))
    assert float(rows[3]["dead_taps"]) == dead
    assert float(rows[3]["distance"]) == results["models"][0]["weights"][3]["distance"]
