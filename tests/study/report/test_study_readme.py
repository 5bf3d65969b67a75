"""The documentation's table and figures of the study, and the README's, are those of the committed results."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

from fastlip.study.report.number_format import number, power

ROOT = Path(__file__).parents[3]


def test_the_headline_table_follows_from_the_committed_results():
    script = ROOT / "benchmarks" / "study_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_figures_beside_it_follow_from_the_committed_results():
    text = " ".join((ROOT / "docs" / "study-results.md").read_text().split())
    results = json.loads((ROOT / "benchmarks" / "results" / "study" / "quick" / "results.json").read_text())

    def short(value: float) -> str:
        return f"{value:.3f}".removeprefix("0")

    readme = " ".join((ROOT / "README.md").read_text().split())
    large = [m for m in results["models"] if m["role"] != "reference"]
    for ratio in (m["ratio_median"] for m in large):
        assert f"{short(ratio['value'])} [{short(ratio['low'])}, {short(ratio['high'])}], n = {ratio['n']}" in text
        assert f"{short(ratio['value'])} [{short(ratio['low'])}, {short(ratio['high'])}], n = {ratio['n']}" in readme
    for row in results["transfer"]:
        if (
            row["strength"] == 1.0
            and row["source"] != row["target"]
            and {row["source"], row["target"]} <= {m["name"] for m in large}
        ):
            assert f"{row['fooled']['k']} of {row['fooled']['n']}" in text
            assert row["noise"]["k"] == 0  # "Gaussian noise of the same norm none"
    assert {v["verdict"] for v in results["verdicts"]} == {"undetermined"}
    config = json.loads((ROOT / "benchmarks" / "results" / "study" / "quick" / "config.json").read_text())
    for row in (row for row in config["power"] if row["question"] == 1):
        assert f"“{row['expected']}”" in text
        assert f" {row['probability']:.3g} ".replace(" 0.", " .") in text


def test_the_figures_of_several_seeds_follow_from_the_committed_results():
    text = " ".join((ROOT / "docs" / "study-results.md").read_text().split())
    section = text.partition("## Several seeds")[2].partition("<!-- seeds table -->")[0]
    folder = ROOT / "benchmarks" / "results" / "study" / "seeds"
    results, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "config"))
    bigger, pretrained, rise, _ = results["verdicts"]
    assert {v["verdict"] for v in results["verdicts"]} == {"undetermined"}

    def estimate(verdict, start: str):
        (found,) = (s["estimate"] for s in verdict["statistics"] if s["name"].startswith(start))
        return found["value"], found["low"], found["high"], found["n"]

    for verdict in (bigger, pretrained):
        assert verdict["headline"].split("fooled by ")[1].split(" of")[0] in section
    value, low, high, seeds = estimate(bigger, "median ratio, ResNet-50")
    shorts = [f"{number:.3f}".removeprefix("0") for number in (value, low, high)]
    assert f"{shorts[0]} [{shorts[1]}, {shorts[2]}], geometric mean over {seeds} seeds" in section
    value, low, high, images = estimate(bigger, "ratio over that of softmax regression")
    assert (
        f"{value:.2f} [{low:.2f}, {high:.2f}] times that of softmax regression on the same {images} images" in section
    )
    assert f"only shown to be {100 * estimate(bigger, 'clean accuracy over')[1]:.1f} points above" in section
    for against in ("minus from scratch, mean", "minus from scratch with the same compute, mean"):
        value, low, high, _ = estimate(rise, f"log smallest distortion, fine-tuned {against}")
        assert f"{math.exp(value):.2f} times [{math.exp(low):.2f}, {math.exp(high):.2f}]" in section
        value, low, high, _ = estimate(rise, f"relative accuracy under PGD at Linf 1/255, fine-tuned {against}")
        assert f"{100 * value:.1f} points [{100 * low:.0f}, {100 * high:.0f}]".replace("-", "−") in section
    (chance,) = (p["probability"] for p in results["power"] if (p["question"], p["expected"]) == (3, "contradicted"))
    assert f"a probability of {chance:.2f}".replace("0.", ".") in section
    models = {arm: [m for m in results["models"] if m["arm"] == arm] for arm in ("scratch", "constrained")}
    for own in models.values():
        logs = [m["lipschitz"]["log10_upper"] for m in own]
        assert f"between {10 ** min(logs):.1e} and {10 ** max(logs):.1e}".replace("e+0", "e+") in section
    for bound in config["settings"]["norm_bounds"]:
        assert str(bound).removesuffix(".0") in section
    least, middle, _ = sorted(m["clean"]["value"] for m in models["constrained"])
    assert f"accuracies of {least:.1%} and {middle:.1%}" in section
    needed = {p["question"]: p["needed"] for p in results["power"] if p["expected"] == "supported" and p["needed"]}
    assert config["settings"]["seeds"] == seeds == 3
    assert needed[4] - seeds == 61
    assert config["command"].removesuffix(" --join").split(" --data")[0] in section


def test_the_figures_of_efficientnet_follow_from_the_committed_results():
    text = " ".join((ROOT / "docs" / "study-results.md").read_text().split())
    section = text.partition("## EfficientNet-Lite0")[2].partition("<!-- efficientnet_lite0 table -->")[0]
    folder = ROOT / "benchmarks" / "results" / "study" / "efficientnet_lite0"
    results = json.loads((folder / "results.json").read_text())
    models = {m["arm"]: m for m in results["models"]}

    def short(value: float) -> str:
        return f"{value:.3f}".removeprefix("0")

    for arm in ("scratch", "finetune"):
        m = models[arm]
        ratio = m["ratio_median"]
        assert f"{short(ratio['value'])} [{short(ratio['low'])}, {short(ratio['high'])}] (n = {ratio['n']})" in section
        assert power(m["lipschitz"]["log10_upper"]) in section
        assert number(m["smallest_pgd"]["stretch"]["mean"]["value"]) in section
    for arm in ("scratch", "finetune", "softmax"):
        assert f"{models[arm]['clean']['value']:.1%}" in section
    assert f"beside {short(models['softmax']['ratio_median']['value'])} for softmax regression" in section
    (rise,) = (
        c["difference"]
        for c in results["comparisons"]
        if (c["arm"], c["against"], c["measure"]) == ("finetune", "scratch", "log smallest distortion")
    )
    value, low, high = (f"{math.exp(rise[side]):.2f}" for side in ("value", "low", "high"))
    assert f"On the {rise['n']} images that both classify, the fine-tuned network is fooled by {value} times" in section
    assert f"[{low}, {high}]" in section
    for row in results["transfer"]:
        if row["strength"] == 1.0 and {row["source"], row["target"]} == {"scratch-s0", "finetune-s0"}:
            assert f"{row['fooled']['k']} of {row['fooled']['n']}" in section
    assert {v["verdict"] for v in results["verdicts"]} == {"undetermined"}
    command = json.loads((folder / "config.json").read_text())["command"].split()
    given = [f"--set {value}" for word, value in itertools.pairwise(command) if word == "--set"]
    assert given
    assert all(setting in section for setting in given)
