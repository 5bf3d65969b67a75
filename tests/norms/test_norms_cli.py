"""python -m fastlip.norms: its outputs, its checkpoints, and its errors."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("jinja2")

from typer.testing import CliRunner, Result

from fastlip.norms import NormInterval, NormReport, layer_norms
from fastlip.norms._cli import app


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs the command in a folder that holds a module of its own."""
    (tmp_path / "tiny_net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),"
        " nn.Linear(256, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda *args: CliRunner().invoke(app, args)
    sys.modules.pop("tiny_net", None)


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoint_to_json_csv_and_html(tmp_path: Path, run: Callable[..., Result], wrapped: bool) -> None:
    model = small_model()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state} if wrapped else model.state_dict(), tmp_path / "weights.pt")
    outputs = ["--json", "out.json", "--csv", "out.csv", "--html", "out.html"]
    done = run("tiny_net:build", "--input", "3,8,8", "--checkpoint", "weights.pt", *outputs)
    assert done.exit_code == 0, done.stderr
    expected = layer_norms(model, (3, 8, 8))
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in data["layers"]] == ["0", "4"]
    assert data["layers"][0]["upper"] == pytest.approx(expected["0"].upper, rel=1e-9)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert float(rows[1]["upper"]) == pytest.approx(expected["4"].upper, rel=1e-9)
    assert "<html" in (tmp_path / "out.html").read_text()
    assert "Product of 2 layers" in done.stdout


def test_safetensors_and_standard_output(tmp_path: Path, run: Callable[..., Result]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_model()
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    done = run("tiny_net:build", "--input", "3,8,8", "--checkpoint", "weights.safetensors", "--json", "-")
    assert json.loads(done.stdout)["layers"][0]["upper"] == pytest.approx(layer_norms(model, (3, 8, 8))["0"].upper)


def test_torchvision_model(run: Callable[..., Result]) -> None:
    pytest.importorskip("torchvision")
    done = run("squeezenet1_1", "--input", "3,32,32", "--classes", "7", "--rtol", "0.2", "--seed", "3")
    assert done.exit_code == 0, done.stderr
    assert "features.0" in done.stdout
    assert "Joint confidence 1" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tiny_net:build", "--input", "3,a"], "--input must be numbers"),
        (["tiny_net:missing"], "tiny_net has no 'missing'; it defines build"),
        (["tiny_net.py:missing"], "tiny_net.py has no 'missing'; it defines build"),
        (["tiny_net:nn"], "must be a torch module or a function that returns one, got module"),
        (["tiny_net:build", "--classes", "3"], "--classes is for models of torchvision and timm"),
        (["timm:no_such_model"], "timm has no model 'no_such_model'"),
        (["no_such_model"], "torchvision has no classification model"),
        (["fcn_resnet50"], "torchvision has no classification model"),  # it would fetch its backbone's weights
        (["tiny_net:build", "--checkpoint", "absent.pt"], "absent.pt"),
        (["tiny_net:build", "--checkpoint", "tiny_net.py"], "no state dict written by torch.save"),
        (["tiny_net:build", "--checkpoint", "model.pt"], "holds more than tensors"),
        (["tiny_net:build", "--checkpoint", "list.pt"], "must hold a state dict, got list"),
        (["tiny_net:build", "--checkpoint", "bad.safetensors"], "no safetensors file"),
        (["tiny_net:build", "--checkpoint", "other.pt"], "Missing key(s)"),
        (["tiny_net:build", "--input", "3,8,8", "--csv", "absent/out.csv"], "absent/out.csv"),
        (["tiny_net:build", "--input", "1,3,8,8"], "without the batch axis"),
        (["tiny_net:build", "--input", "3,8,8", "--method", "fft"], "method must be one of"),
        (["tiny_net:build", "--input", "3,8,8", "--seed", str(2**64)], "--seed must fit 64 bits"),
        (["tiny_net:build", "--input", "3,8,8", "--rtol", "nan"], "--rtol must be above 0"),
        (["tiny_net:build", "--input", "3,8,8", "--confidence", "1"], "--confidence must lie strictly between"),
        (["tiny_net:build", "--input", "3,8,99999999999999999999"], "--input 3,8,99999999999999999999 is larger"),
        (["squeezenet1_1", "--classes", "0"], "--classes must be a number of classes, got 0"),
    ],
)
def test_errors_are_one_line(run: Callable[..., Result], args: list[str], message: str) -> None:
    torch.save(small_model(), "model.pt")
    torch.save([1, 2], "list.pt")
    torch.save({f"layers.{i}.weight": torch.zeros(1) for i in range(99)}, "other.pt")
    Path("bad.safetensors").write_text("junk")
    done = run(*args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert len(done.stderr) < 600


def test_a_module_may_be_named(run: Callable[..., Result], tmp_path: Path) -> None:
    with open(tmp_path / "tiny_net.py", "a") as file:
        file.write("ready = build()\n")
    done = run("tiny_net:ready", "--input", "3,8,8", "--csv", "-")
    assert done.exit_code == 0, done.stderr


def test_what_is_left_out_is_shown_and_may_be_refused(run: Callable[..., Result], tmp_path: Path) -> None:
    name = "[red]" + ESCAPES
    with open(tmp_path / "tiny_net.py", "a") as file:
        file.write(f"odd = nn.Sequential(nn.Linear(3, 2))\nodd.add_module({name!r}, nn.LayerNorm(2))\n")
    done = run("tiny_net:odd", "--input", "3")
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "No product: 1 weight is left out beside these 1 layer" in text
    assert "Left out: [red]" in text
    assert "layer_norm divides by a deviation of its input" in text
    assert harmless(done.stdout)
    assert [
        row["name"] for row in json.loads(run("tiny_net:odd", "--input", "3", "--json", "-").stdout)["left_out"]
    ] == [f"{name}.weight"]
    page = run("tiny_net:odd", "--input", "3", "--html", "-").stdout
    assert "Left out: layer_norm divides" in page
    assert harmless(page)
    refused = run("tiny_net:odd", "--input", "3", "--strict")
    assert refused.exit_code == 2
    assert "would be left out: layer_norm divides" in refused.stderr
    assert harmless(refused.stderr)


def test_models_of_libraries_may_be_named_as_in_the_study(run: Callable[..., Result]) -> None:
    pytest.importorskip("torchvision")
    tiny = ("--input", "3,64,64", "--rtol", "0.5", "--csv", "-")
    plain, named = (run(f"{prefix}squeezenet1_1", "--classes", "2", *tiny) for prefix in ("", "torchvision:"))
    names = [row.partition(",")[0] for row in plain.stdout.splitlines()]
    assert plain.exit_code == 0, plain.stderr
    assert [row.partition(",")[0] for row in named.stdout.splitlines()] == names


def test_a_model_of_timm(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    done = run("timm:lcnet_035", "--classes", "5", "--input", "3,32,32", "--rtol", "0.9", "--csv", "-")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("classifier,Linear 1280→5,")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run("timm:lcnet_035").stderr == 'error: timm\'s models need timm: pip install "fastlip[timm]"\n'


@pytest.mark.parametrize("columns", [98, 101, 106, 130])
def test_what_a_terminal_shows_is_whole(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    name = "a" * 52
    with open(tmp_path / "tiny_net.py", "a") as file:
        file.write("class Long(nn.Sequential):\n    def __init__(self):\n        super().__init__()\n")
        file.write(f"        self.{name} = nn.Linear(3, 2)\n")
    monkeypatch.setenv("COLUMNS", str(columns))
    header, row = (line.rstrip() for line in run("tiny_net:Long", "--input", "3").stdout.splitlines()[:2])
    assert header.endswith("method")
    assert (row.split()[0], row.split()[-3:]) == (name, ["exact", "closed", "form"])
    assert ("Linear 3→2" in row) == (columns == 130)


def test_a_product_with_a_layer_of_norm_0_is_0() -> None:
    zero, unknown = NormInterval(0.0, 0.0, 1.0, "svd", 0, True), NormInterval(1.0, math.inf, 1.0, "power", 7, False)
    below = NormInterval(0.0, 100.0, 1.0, "svd", 0, True)
    for norms, words in (((zero, unknown), "0 to 0"), ((below,), "0 to 10^2.000"), ((unknown,), "10^0.000 to 10^inf")):
        report = NormReport(dict(zip("ab", norms, strict=False)), dict.fromkeys("ab"[: len(norms)], ""), 1.0, None)
        assert report.product().endswith(f": {words}")


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "fastlip.norms", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--checkpoint" in done.stdout


def test_page_escapes_names_and_is_self_contained() -> None:
    report = layer_norms(nn.Sequential(nn.Linear(3, 2)), (3,))
    page = report.to_html("a <b> & c")
    assert "a &lt;b&gt; &amp; c" in page
    assert "http" not in page
    assert f"{report['0'].upper:.5g}" in page
    hostile = replace(report, descriptions={"0": "<script>"})
    assert "<script>" not in hostile.to_html("</title><script>")


def test_a_page_has_a_row_for_each_layer() -> None:
    zero, one = (NormInterval(x, x, 1.0, "svd", 0, True) for x in (0.0, 2.0))
    wide = NormInterval(1.0, math.inf, 1.0 - 1e-6, "lanczos", 7, False)
    report = NormReport({"a": zero, "b": one, "c": wide}, dict.fromkeys("abc", "Linear"), 1.0 - 1e-6, 5)
    page = report.to_html("net")
    assert re.findall(r'width:([\d.]+)%"></div>', page) == ["0.0", "100.0", "100.0"]
    assert re.findall(r'<td class="n">(exact|inf%)</td>', page) == ["exact", "exact", "inf%"]
    assert "3 layers" in page
    assert "with confidence 1 - 1e-06 (seed of the random starts 5).</p>" in page
    assert "seed" not in replace(report, seed=None).to_html("net")


def test_a_page_needs_jinja(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for where in ("-", "out.html"):
        done = run("tiny_net:build", "--input", "3,8,8", "--html", where)
        assert done.exit_code == 2
        assert done.stderr == 'error: HTML reports need Jinja2: pip install "fastlip[study]"\n'
    assert run("tiny_net:build", "--input", "3,8,8", "--csv", "-").exit_code == 0


ESCAPES = "\x1b[2J\x1b]0;x\x07\x9b31m\u202e\u2066\r\n\x00"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda s: {1: torch.zeros(2)}, ["names must be strings, got 1 (int)"]),
        (lambda s: {None: torch.zeros(2)}, ["names must be strings, got None (NoneType)"]),
        (lambda s: {"state_dict": {("a", ESCAPES): torch.zeros(2)}}, ["names must be strings", "(tuple)"]),
        (lambda s: s | {"4.weight": s["4.weight"] * (1 + 1j)}, ["'4.weight' is complex (torch.complex64)"]),
        (lambda s: s | {"4.weight": s["4.weight"].char()}, ["'4.weight' holds torch.int8", "torch.float32"]),
        (lambda s: s | {"4.weight": 3}, ["'4.weight' must be a tensor, got int"]),
        (lambda s: s | {"module.4.weight": s["4.weight"] + 1}, ["'4.weight' twice", "'module.'"]),
        (lambda s: {f"module.{k}": v for k, v in s.items()} | {"0.bias": s["0.bias"]}, ["'0.bias' twice"]),
        (lambda s: {k: v for k, v in s.items() if k != "4.bias"}, ["Missing key(s): '4.bias'"]),
        (lambda s: s | {ESCAPES: torch.zeros(1)}, ["Unexpected key(s)", "x1b", "u202e"]),
        (
            lambda s: {f"{k}{i}": v for k, v in s.items() for i in range(2)},
            ["Missing key(s): '0.weight', '0.bias', '1.weight' and", "Unexpected key(s): '0.weight0', '0.weight1',"],
        ),
        (lambda s: s | {"4.weight": torch.zeros(2, 3)}, ["size mismatch for 4.weight"]),
    ],
)
def test_a_strangers_checkpoint_is_refused_by_name(run: Callable[..., Result], change, messages: list[str]) -> None:
    torch.save(change(small_model().state_dict()), "weights.pt")
    done = run("tiny_net:build", "--input", "3,8,8", "--checkpoint", "weights.pt")
    assert done.exit_code == 2, done.output
    for message in messages:
        assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert harmless(done.stderr)
    assert not done.stdout


def test_a_refused_pickle_is_named_without_torchs_colours(run: Callable[..., Result]) -> None:
    torch.save({"m": nn.Linear(2, 2)}, "weights.pt")
    done = run("tiny_net:build", "--input", "3,8,8", "--checkpoint", "weights.pt")
    assert done.exit_code == 2
    assert "GLOBAL torch.nn.modules.linear.Linear" in done.stderr
    assert "[1m" not in done.stderr
    assert harmless(done.stderr)


def test_a_model_may_have_a_part_called_module(run: Callable[..., Result], tmp_path: Path) -> None:
    with open(tmp_path / "tiny_net.py", "a") as file:
        file.write("class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n")
        file.write("        self.module = nn.Linear(3, 2)\n    def forward(self, x):\n        return self.module(x)\n")
    torch.save({"module.weight": 7 * torch.eye(2, 3), "module.bias": torch.zeros(2)}, "weights.pt")
    done = run("tiny_net:Net", "--input", "3", "--checkpoint", "weights.pt", "--json", "-")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["layers"][0]["upper"] == pytest.approx(7.0)


def test_names_of_layers_reach_no_terminal_as_commands(run: Callable[..., Result], tmp_path: Path) -> None:
    name = "[red]&<b>" + ESCAPES
    with open(tmp_path / "tiny_net.py", "a") as file:
        file.write(f"odd = nn.Sequential()\nodd.add_module({name!r}, nn.Linear(3, 2))\n")
    outputs = [("--csv", "-"), ("--json", "-"), ("--html", "-"), ()]
    shown = [run("tiny_net:odd", "--input", "3", *output) for output in outputs]
    for done in shown:
        assert done.exit_code == 0, done.stderr
        assert harmless(done.stdout)
    csv_, json_, html, table = (done.stdout for done in shown)
    assert len(list(csv.DictReader(io.StringIO(csv_)))) == 1
    assert json.loads(json_)["layers"][0]["name"] == name  # to a program a name is a name
    assert "[red]&amp;&lt;b&gt;" in html
    assert "[red]" in table


def prefixed(*prefixes: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {"".join(prefixes) + name: value for name, value in state.items()}


CHECKPOINTS = {
    "compiled": prefixed("_orig_mod."),
    "DDP of compiled": prefixed("module.", "_orig_mod."),
    "compiled DDP": prefixed("_orig_mod.", "module."),
    "lightning": lambda s: {"state_dict": prefixed("model.")(s), "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {}},
    "net": lambda s: {"net": s, "acc": 93.0},
    "EMA beside": lambda s: {"state_dict_ema": {k: v + 1 for k, v in s.items()}, "state_dict": s},
    "EMA alone": lambda s: {"model_ema": prefixed("module.")(s)},
    "averaged": lambda s: prefixed("module.")(s) | {"n_averaged": torch.tensor(3)},
    "two deep": lambda s: {"model": {"state_dict": s}},
    "compiled part": lambda s: {k.replace("4.", "4._orig_mod."): v for k, v in s.items()},
}


@pytest.mark.parametrize("form", list(CHECKPOINTS))
def test_forms_of_checkpoints(tmp_path: Path, run: Callable[..., Result], form: str) -> None:
    model = small_model()
    torch.save(CHECKPOINTS[form](model.state_dict()), tmp_path / "weights.pt")
    done = run("tiny_net:build", "--input", "3,8,8", "--checkpoint", "weights.pt", "--json", "-")
    assert done.exit_code == 0, done.stderr
    upper = [row["upper"] for row in json.loads(done.stdout)["layers"]]
    assert upper == pytest.approx([interval.upper for interval in layer_norms(model, (3, 8, 8)).values()], rel=1e-6)


def test_a_model_whose_own_names_have_such_a_prefix(tmp_path: Path, run: Callable[..., Result]) -> None:
    """The attribute is called "model", and its checkpoint is one of it, or of what it holds."""
    (tmp_path / "tiny_net.py").write_text(
        "from torch import nn\n"
        "class Holder(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        return self.model(x)\n"
    )
    inner = {"weight": 7 * torch.eye(2, 3), "bias": torch.zeros(2)}
    for prefixes in ((), ("model.",), ("module.", "model.")):
        torch.save(prefixed(*prefixes)(inner), tmp_path / "weights.pt")
        done = run("tiny_net:Holder", "--input", "3", "--checkpoint", "weights.pt", "--json", "-")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["layers"][0]["upper"] == pytest.approx(7.0)
