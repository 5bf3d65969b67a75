"""The tables of the page of results, made from the committed CSV files."""

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import results_tables

    return results_tables


def test_every_table_that_the_page_shows_is_made(tables, tmp_path):
    tables.write(tmp_path)
    shown = re.findall(r"{include} _build/tables/(\w+\.md)", (DOCS / "results.md").read_text())
    assert {"strength_suites.md", "strength_norms.md"} <= set(shown)
    for name in shown:
        assert "\n| --- |" in (tmp_path / name).read_text().replace("|---|", "| --- |"), name


@pytest.mark.parametrize("name", ["strength_suites", "strength_norms", "attackbench_cpu"])
def test_a_table_has_a_line_for_each_row(tables, tmp_path, name):
    tables.write(tmp_path)
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    rows = tables.rows_of(name)
    assert rows
    for row in rows:
        assert any(line.startswith(f"| {row['network']}, ") and f": {row['what']} |" in line for line in lines)


def test_bounds_of_networks_have_a_line_each_with_the_other_build_beside_it(tables):
    machine = {"device": "a", "isa": "b", "threads": "1", "torch": "c", "fastlip": "d"}
    named = {"size": "224", "domain": "everywhere", "note": ""}
    numbers = {"log10_upper": "20.5", "cpu_seconds": "8.5", "MiB": "900", "model_MiB": "400"}
    missing = dict.fromkeys(numbers, "")
    rows = [
        named | numbers | machine | {"model": "one", "build": "other", "cpu_seconds": "17", "MiB": "800"},
        named | numbers | machine | {"model": "one", "build": "this"},
        named | missing | machine | {"model": "two", "build": "other", "note": "refused: no rule"},
        named | numbers | machine | {"model": "two", "build": "this"},
        named | missing | machine | {"model": "three", "build": "this", "note": "no bound within 9 CPU seconds"},
    ]
    assert tables.TABLES["lipschitz_cpu"](rows).splitlines()[2:] == [
        "| one, 224×224, everywhere | 20.50 | 8.5 | 900 | 400 | 17 | 800 |",
        "| two, 224×224, everywhere | 20.50 | 8.5 | 900 | 400 | – | – |",
        "| three, 224×224, everywhere | no bound within 9 CPU seconds | – | – | – | – | – |",
    ]


def test_what_the_readme_says_of_bounds_follows_from_the_rows(tables):
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    zoo = tables.rows_of("zoo")

    def accepted(family: str) -> str:
        verdicts = [r["verdict"] for r in zoo if (r["mode"], r["family"]) == ("bound", family)]
        return f"{verdicts.count('accepted')} of {len(verdicts)}"

    listed = sum(r["mode"] == "rules" and r["family"] == "torchvision" for r in zoo)
    assert accepted("torchvision") == f"{listed} of {listed}"
    assert f"{listed} of torchvision's {listed} classification models" in readme
    assert f"{accepted('timm')} timm architectures" in readme
    assert f"{accepted('robustbench')} RobustBench definitions" in readme
    assert f"{accepted('transformers')} Hugging Face classifiers" in readme
    bounds = [r for r in zoo if r["mode"] == "bound" and r["verdict"] == "accepted"]
    assert "none below the stretch that was found" in readme
    assert all(float(r["log10_upper"]) > float(r["log10_stretch"]) for r in bounds)

    value = {(r["network"], r["method"]): float(r["value"]) for r in tables.rows_of("chain_bounds_cpu") if r["value"]}
    five = [network for network, method in value if method == "ECLipsE-Fast"]
    ours = {
        network: next(v for (n, m), v in value.items() if n == network and m.startswith("fastlip")) for network in five
    }
    gains = [value[network, "plain"] / ours[network] for network in five]
    assert f"{min(gains):.1f} to {max(gains):.1f} times below the product of layer norms on five" in readme
    assert len(five) == 5
    assert all(value[network, "fastlip"] <= value[network, "ECLipsE-Fast"] for network in five)


def test_bounds_of_small_networks_are_as_close_to_the_optimum_as_the_documentation_says(tables):
    rows = tables.rows_of("chain_bounds_cpu")
    ours = [r for r in rows if r["method"] == "fastlip"]
    residual = [r for r in ours if r["network"].startswith("residual")]
    assert len(ours) - len(residual) == 5
    assert all(float(r["x_lipsdp"]) <= 1.05 and float(r["x_plain"]) <= 20.0 for r in ours)
    # A trained convolutional one is further from its largest stretch, as the semidefinite program's optimum is.
    assert sum(float(r["ratio"]) <= 4.0 for r in residual) >= 5
    for solved in (r for r in rows if r["method"] == "LipSDP"):
        assert float(solved["x_lipsdp"]) == pytest.approx(1.0, abs=2e-3)
        assert solved["how"]


def test_disjoint_parts_make_no_bound_larger(tables):
    rows = tables.rows_of("joined_parts_cpu")
    assert {r["network"].split("_")[0] for r in rows} >= {"shufflenet", "res2net50"}
    assert all(float(r["log10_upper"]) < float(r["log10_independent"]) for r in rows)


def test_what_the_readme_says_of_speed_follows_from_the_rows(tables):
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    pgd = [r for r in tables.rows_of("attacks_cpu") if r["attack"] == "pgd-20" and r["threads"] == "1"]

    def between(network: str, what: str) -> str:
        speeds = [float(r["x_fastest_peer"]) for r in pgd if (r["network"], r["what"]) == (network, what)]
        return f"{min(speeds):.2f} to {max(speeds):.2f}"

    assert f"run in {between('resnet50', 'fastlip')} of the fastest peer's speed" in readme
    assert f"with `fast=True` in {between('resnet50', 'fastlip, fast')}" in readme
    assert f"on a ResNet-18 for small images in {between('resnet18', 'fastlip, fast')}" in readme
    assert f"on three small convolutions in {between('small', 'fastlip, fast')}" in readme
    chosen = ("cifar", "random", "fastlip", "rtol 0.01")
    rows = [r for r in tables.rows_of("layer_norms_cpu") if r["x_torch_power"]]
    power = [float(r["x_torch_power"]) for r in rows if (r["stem"], r["weights"], r["method"], r["setting"]) == chosen]
    assert any(f"take {v:.2f} of 100 steps of power iteration" in readme for v in power)


def test_how_much_memory_attacks_take(tables):
    text = " ".join((DOCS / "results.md").read_text().split())
    rows = [r for r in tables.rows_of("attack_memory_cpu") if r["what"] == "fastlip, fast"]
    shares = [float(r["memory_mb"]) / float(r["old_mb"]) for r in rows]
    assert f"{min(shares):.2f} to {max(shares):.2f} of what it took at 655219d" in text


def test_how_long_packed_convolutions_take(tables):
    text = " ".join((DOCS / "results.md").read_text().split())
    for network in ("resnet50", "resnet18"):
        rows = [r for r in tables.rows_of("indirect_conv_cpu") if r["network"] == network]
        packed, floor, torch = (
            sum(float(r["us"]) * int(r["count"]) for r in rows if r["what"] == what) / 1e3
            for what in ("packed", "floor", "PyTorch")
        )
        assert f"{packed:.0f} ms beside {floor:.0f} ms and {torch:.0f} ms" in text
    images = [
        float(r["x_torch"])
        for r in tables.rows_of("indirect_conv_cpu")
        if (r["pass"], r["what"]) == ("gradient", "packed") and int(r["channels"]) <= 3
    ]
    assert f"takes {min(images):.2f} to {max(images):.2f} of the time that it takes PyTorch" in text
    for network in ("small", "small_mnist"):  # where it is most of the backward pass
        rows = [r for r in tables.rows_of("indirect_conv_cpu") if (r["network"], r["pass"]) == (network, "gradient")]
        first, other = sorted((int(r["channels"]), float(r["us"])) for r in rows if r["what"] == "PyTorch")
        assert first[1] > other[1]


def test_the_guide_says_how_fast_adversarial_training_is(tables):
    text = " ".join((DOCS / "guides" / "adversarial-training.md").read_text().split())
    speed = {(r["network"], r["way"]): float(r["x_torchattacks"]) for r in tables.rows_of("adversarial_training_cpu")}
    large, small = ([speed[network, way] for way in ("fastlip", "fastlip, fast")] for network in ("resnet18", "small"))
    assert f"has {large[0]:.2f} of its images a second on a ResNet-18 and {small[0]:.2f} on a network" in text
    assert f"with `fast=True` as well {large[1]:.2f} and {small[1]:.2f}" in text
    assert min(speed[network, "fastlip, falling"] for network in ("resnet18", "small")) > 3.0


def test_local_constants_are_compared_on_the_same_images_and_are_bounds(tables):
    rows = tables.rows_of("local_bounds_cpu")
    assert len({r["network"] for r in rows if r["network"].startswith("cnn")}) >= 2
    for row in rows:
        # Below the lower side that was found in the ball it would be no bound, and compared in vain.
        assert float(row["over_lower"]) >= 1.0, row
        assert row["images"] == rows[0]["images"]
        if row["method"].startswith("auto_LiRPA"):
            assert float(row["x_fastlip"]) >= 1.0, row


def test_pages_say_where_attacks_miss_their_aims(tables):
    machine = {"device": "a", "isa": "b", "threads": "1", "torch": "c", "fastlip": "d"}
    suite = machine | {
        "network": "n",
        "norm": "linf",
        "images": "64",
        "clean": "60",
        "robust": "9",
        "fooled_alone": "0",
    }
    suite |= {"cpu_s": "9", "x_wall": "1", "what": "fastlip", "missed": "0"}
    rows = [
        suite | {"eps": "0.003922", "x_cpu": "0.48"},
        suite | {"eps": "0.007843", "x_cpu": "0.512", "missed": "1"},
        suite | {"eps": "0.007843", "x_cpu": "1", "what": "AutoAttack"},
        suite | {"norm": "l2", "eps": "0.25", "x_cpu": "0.3", "what": "fastlip, fast"},
    ]
    said = tables.TABLES["strength_suites"](rows).splitlines()
    assert said[0] == (
        '"fastlip": AutoAttack alone fools 1 of 128 images; at most 0.5 of its CPU seconds in 1 of 2; more: '
        "n, Linf 2/255 (0.512)."
    )
    assert said[2].endswith("alone fools 0 of 64 images; at most 0.5 of its CPU seconds in 1 of 1.")
    norms = machine | {"network": "n", "norm": "l1", "median": "1", "mean": "1", "wins": "1", "images": "1"}
    norms |= {"found": "1", "cpu_s": "1", "what": "fastlip fmn"}
    rows = [norms | {"calls": "100", "x_median": "1.004"}, norms | {"calls": "1000", "x_median": "1.0212"}]
    said = tables.TABLES["strength_norms"](rows).splitlines()[0]
    assert said.endswith("at most 1.01 of the best peer's in 1 of 2; more: n, l1, 1000 calls (1.021).")
