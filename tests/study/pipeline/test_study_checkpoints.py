"""Checkpoints that the study did not train: measured like its own under their own names, and refused in one line."""

import hashlib
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

from fastlip.models import build_model, load_checkpoint, resnet18, save_checkpoint
from fastlip.study import cli, frame
from fastlip.study.errors import StudyError
from fastlip.study.pipeline import runner
from fastlip.study.settings import presets
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.storage.json_files import read_results
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.training.architectures import build, description
from fastlip.study.training.given_checkpoints import given_network

SPEC = "torchvision:resnet18"
CLASSES = 6

README = Path(__file__).parents[3] / "fastlip" / "study" / "README.md"


@pytest.fixture(scope="module")
def network():
    """ResNet-18 without its normalisation; its weights are those of seed 0, and BatchNorm's scales are not 0."""
    found = resnet18(CLASSES, seed=0).get_submodule("network")
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return found


def settings(normalize="", **changes):
    changes = {
        "arms": (),
        "checkpoints": ("tuned",),
        "model": SPEC,
        "normalize": normalize,
        "stem": "imagenet",
    } | changes
    return replace(presets.preset("quick"), **changes)


def given(path, classes=CLASSES, **changes):
    return given_network(settings(**changes), "tuned", path, classes)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "network.", "module._orig_mod.", "_orig_mod.network."])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_found_behind_what_wrapped_the_network(tmp_path, network, prefix, nested):
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if nested else state, tmp_path / "a.pth")
    found, words = given(tmp_path / "a.pth")
    own = found.get_submodule("network").state_dict()
    assert all(torch.equal(own[name], value) for name, value in network.state_dict().items())
    assert words == "input normalised by cifar10, the default for this target"
    assert found.get_submodule("normalize").mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])


def test_old_checkpoints_do_not_count_batches(tmp_path, network):
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    found, _ = given(tmp_path / "a.safetensors")
    assert torch.equal(found.get_submodule("network").fc.weight, network.fc.weight)


@pytest.mark.parametrize(
    ("normalize", "dataset", "mean", "words"),
    [
        ("imagenet", "cifar10", 0.485, "input normalised by imagenet"),
        ("none", "cifar10", 0.0, "input not normalised"),
        ("0.1,0.2,0.3/1,2,3", "cifar10", 0.1, "input normalised by 0.1,0.2,0.3/1,2,3"),
        ("", "svhn", 0.4377, "input normalised by svhn, the default for this target"),
        ("", "folder", 0.485, "input normalised by imagenet, the default for this target"),
    ],
)
def test_the_normalisation_is_given_or_that_of_the_target(tmp_path, network, normalize, dataset, mean, words):
    torch.save(network.state_dict(), tmp_path / "a.pth")
    found, said = given(tmp_path / "a.pth", normalize=normalize, dataset=dataset)
    assert said == words
    assert found.get_submodule("normalize").mean.flatten()[0].item() == pytest.approx(mean)


def test_a_checkpoint_of_the_study_has_its_own_normalisation(tmp_path):
    model = resnet18(CLASSES, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), seed=0)
    save_checkpoint(tmp_path / "a.safetensors", model)
    found, words = given(tmp_path / "a.safetensors")
    assert words == "input normalised as the checkpoint says"
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(found.eval()(x), model.eval()(x))
    given(tmp_path / "a.safetensors", normalize="0.1,0.2,0.3/0.4,0.5,0.6")
    with pytest.raises(StudyError, match="another normalisation than --normalize"):
        given(tmp_path / "a.safetensors", normalize="imagenet")


def test_a_checkpoint_of_the_study_keeps_its_stem_and_scale(tmp_path):
    """Their weights fit every stem and scale; another network would be measured in the place of the trained one."""
    trained = settings(stem="stride-2", scale=2)
    save_checkpoint(tmp_path / "a.safetensors", build(trained, "tuned", CLASSES, 0), description(trained, "tuned"))
    given(tmp_path / "a.safetensors", stem="stride-2", scale=2)
    for changes, message in (
        ({"scale": 2}, "trained with stem=stride-2 and is to be measured with stem=imagenet: give --set stem=stride-2"),
        ({"stem": "stride-2"}, "give --set scale=2"),
    ):
        with pytest.raises(StudyError, match=message):
            given(tmp_path / "a.safetensors", **changes)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "layer1.0.conv1.weight"), r"it lacks layer1\.0\.conv1\.weight, one of 1 missing"),
        (lambda s: {f"body.{k}": v for k, v in s.items()}, r"it lacks conv1\.weight, .*it has body\.bn1\.bias"),
        (lambda s: s | {"extra": torch.zeros(1)}, "it has extra, one of 1 tensors that the network has not"),
        (
            lambda s: s | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"conv1\.weight has the shape \[64, 3, 3, 3\] where the network's has \[64, 3, 7, 7\]",
        ),
        (
            lambda s: s | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)},
            r"it has 1000 classes where the target has 6 \(fc\.weight, fc\.bias\)",
        ),
        (lambda s: s | {"fc.bias": torch.full((6,), torch.nan)}, r"fc\.bias holds NaN or infinity"),
        (lambda s: s | {"fc.bias": torch.zeros(6, dtype=torch.int8)}, r"fc\.bias is torch\.int8"),
        (lambda s: {"weights": [1, 2]}, "holds no state dict"),
        (lambda s: {"model": s, "ema": s}, r"several state dicts \(model, ema\)"),
    ],
)
def test_another_network_is_refused_by_its_first_difference(tmp_path, network, change, message):
    torch.save(change(network.state_dict()), tmp_path / "a.pth")
    with pytest.raises(StudyError, match=message) as caught:
        given(tmp_path / "a.pth")
    assert caught.value.status == 2
    assert str(caught.value).startswith("--checkpoint tuned=")
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_files_that_are_no_checkpoints(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict() | {"fc.bias": Bomb()}, "code.pth")
    Path("code.safetensors").write_bytes(Path("code.pth").read_bytes())
    safetensors.torch.save_file({"fc.bias": torch.zeros(6)}, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-5])
    Path("folder.pth").mkdir()
    for name, message in (
        ("code.pth", "cannot be read"),
        ("code.safetensors", "cannot be read"),
        ("cut.safetensors", "cannot be read"),
        ("folder.pth", "is not a file"),
        ("absent.pth", "is not a file"),
    ):
        with pytest.raises(StudyError, match=rf"--checkpoint tuned={name} {message}") as caught:
            given(Path(name))
        assert caught.value.status == 2
        assert "weights_only" not in str(caught.value)
    assert not Path("exploded").exists()


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastlip.study", *map(str, arguments)])
    cli.app(standalone_mode=False)


GATED = """
import torch

class Gated(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x * x.mean((2, 3), keepdim=True).sigmoid())

def network(num_classes):
    return Gated(torch.nn.Flatten(), torch.nn.Linear(3072, num_classes))
"""


def test_a_network_without_a_certified_bound_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "gated_networks.py").write_text(GATED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("gated_networks:network", CLASSES).get_submodule("network").state_dict(), "a.pth")
    arguments = ("--checkpoint", "a=a.pth", "--model", "gated_networks:network", "--preset", "demo", "--out", "run")
    with pytest.raises(
        StudyError, match=r"gated_networks:network has no certified Lipschitz bound: .*no global"
    ) as caught:
        command(monkeypatch, "measure", *arguments)
    assert caught.value.status == 2
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the checkpoints"),
        (("--checkpoint", "a.pth"), "write it as NAME=FILE"),
        (("--checkpoint", "a=a.pth", "--checkpoint", "a=b.pth"), "given twice"),
        (("--checkpoint", "a=a.pth"), "--model: name one SPEC"),
        (("--checkpoint", "a=a.pth", "--model", "b=x:y"), "no --checkpoint has that name"),
        (("--checkpoint", "a=a.pth", "--checkpoint", "b=b.pth", "--model", "b=x:y"), "NAME=SPEC for each of them"),
        (("--checkpoint", "a=a.pth", "--model", "x:y", "--model", "x:z"), "--model: name one SPEC"),
        (("--checkpoint", "a b=a.pth", "--model", SPEC), "letters, digits"),
        (("--checkpoint", "a=a.pth", "--model", SPEC, "--preset", "huge"), "--preset huge does not exist"),
        (("--checkpoint", "a=a.pth", "--model", SPEC, "--normalize", "magic"), "normalize=magic"),
        (("--checkpoint", "a=a.pth", "--model", SPEC, "--preset", "demo"), "a=a.pth is not a file"),
        (("--checkpoint", "a=a.pth", "--model", SPEC, "--set", "checkpoints=b"), "no such setting"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTLIP_DATA", raising=False)
    with pytest.raises(StudyError, match=message) as caught:
        command(monkeypatch, "measure", *arguments)
    assert caught.value.status == 2
    assert list(tmp_path.iterdir()) == []


def block(name):
    """A block of code of the study's README."""
    found = re.search(rf"<!-- test:{name} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def photos(root, split, each):
    """Random images of three classes."""
    rng = np.random.default_rng(len(split))
    for name in ("cat", "dog", "emu"):
        (root / split / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A ConvNet in the study's own form, and the bare state dict of a perceptron as DataParallel would write it."""
    root = tmp_path_factory.mktemp("given")
    save_checkpoint(root / "convnet.safetensors", build_model("fastlip:convnet", 3, seed=0))
    state = build_model("fastlip:mlp", 3, seed=1).get_submodule("network").state_dict()
    torch.save({"module." + name: value for name, value in state.items()}, root / "mlp.pth")
    photos(root / "photos", "test", 8)
    return {"scratch": root / "convnet.safetensors", "tuned": root / "mlp.pth"}


@pytest.fixture(scope="module")
def arguments(files, micro_arguments):
    """The README's command for two networks, one of them under the name of an arm."""
    text = block("measure").replace("\\\n", "").replace("--out RUN", "")
    text = text.replace("--model timm:resnet18", "--model scratch=fastlip:convnet --model tuned=fastlip:mlp")
    for word, path in (
        ("A.safetensors", files["scratch"]),
        ("B.pth", files["tuned"]),
        ("PHOTOS", files["tuned"].parent / "photos"),
    ):
        assert word in text
        text = text.replace(word, str(path))
    words = shlex.split(text)
    assert words[:4] == ["python", "-m", "fastlip.study", "measure"]
    return words[3:] + [a for a in micro_arguments if a.startswith("--set=") and not a.startswith("--set=arms=")]


@pytest.fixture(scope="module")
def measured(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "run"
    with pytest.MonkeyPatch.context() as patch:
        command(patch, *arguments, "--out", out)
    return RunDirectory(out)


def test_every_stage_but_training_is_carried_out_under_the_checkpoints_names(measured):
    names = {stage.partition(": ")[0] for stage in measured.read_timings()}
    assert names == {"scratch", "tuned", "results", "report"}
    assert {
        "scratch: import",
        "tuned: clean",
        "tuned: smallest-pgd",
        "scratch: norms",
    } <= measured.read_timings().keys()
    assert not (measured.path / "training").exists()
    assert measured.report.read_text().endswith("</html>")


def test_results_say_that_the_study_trained_none_of_them(measured):
    results = read_results(measured.results, ["scratch", "tuned"])
    for model in results["models"]:
        assert (model["role"], model["training"], model["arm"]) == ("checkpoint", None, model["name"])
        assert all(weight["distance"] is None for weight in model["weights"])
        assert model["dataset"] == "photos"
    assert [m["architecture"] for m in results["models"]] == ["fastlip:convnet", "fastlip:mlp"]
    assert {v["verdict"] for v in results["verdicts"]} == {"undetermined"}
    assert results["source"] == "none"
    assert {"scratch", "tuned"} <= set(frame(measured.path).model)


def test_files_and_normalisation_are_among_the_fingerprints(measured, files):
    inputs = measured.config["inputs"]
    digest = hashlib.sha256(files["tuned"].read_bytes()).hexdigest()
    assert inputs["tuned"] == f"sha256 {digest}, input normalised by imagenet"
    assert inputs["scratch"].endswith(", input normalised as the checkpoint says")
    weights, meta = load_checkpoint(measured.checkpoint("scratch"))
    made_for = {"images": "photos", "classes": "3", "input": "input normalised as the checkpoint says"}
    assert meta == made_for | {"model": "fastlip:convnet", "stem": "imagenet", "scale": "1"}
    assert all(torch.equal(value, weights[name]) for name, value in load_checkpoint(files["scratch"])[0].items())


def test_networks_are_measured_as_they_are(measured, arguments):
    """Not with the stem of the preset, which would load the same weights."""
    assert presets.preset("quick").stem != "imagenet"
    assert "--preset" not in arguments
    assert (measured.settings.preset, measured.settings.stem, measured.settings.scale) == ("quick", "imagenet", 1)


def test_the_report_names_them(measured):
    html = measured.report.read_text()
    assert "scratch" in html
    assert "tuned" in html


def test_the_same_command_resumes_and_another_file_is_refused(measured, arguments, files, tmp_path, monkeypatch):
    (measured.images("tuned", "clean")).unlink()
    kept = {p: p.read_bytes() for p in measured.path.rglob("*.npz")}
    command(monkeypatch, *arguments, "--out", measured.path)
    assert measured.images("tuned", "clean").exists()
    assert {p: p.read_bytes() for p in kept} == kept
    other = tmp_path / "other.pth"
    state = torch.load(files["tuned"], weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, other)
    swapped = [a.replace(str(files["tuned"]), str(other)) for a in arguments]
    with pytest.raises(StudyError, match=r"another configuration: tuned \(other files\)"):
        command(monkeypatch, *swapped, "--out", measured.path)


def test_a_plan_takes_over_the_checkpoints_first(measured, arguments, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command(monkeypatch, *arguments, "--out", out, "--plan")
    plan = sorted((out / "plan").iterdir())
    assert [file.name for file in plan] == ["1-checkpoints.txt", "2-measurement.txt", "3-transfer.txt", "4-results.txt"]
    lines = [file.read_text().splitlines() for file in plan]
    assert list(map(len, lines)) == [2, 2, 2, 1]
    for line in reversed(lines[0]):
        words = shlex.split(line)
        assert words[:4] == [sys.executable, "-m", "fastlip.study", "measure"]
        command(monkeypatch, *words[3:])
    assert RunDirectory(out).read_timings().keys() == {"scratch: import", "tuned: import"}
    for name in ("scratch", "tuned"):
        again, before = (load_checkpoint(run.checkpoint(name))[0] for run in (RunDirectory(out), measured))
        assert all(torch.equal(value, again[key]) for key, value in before.items())


def test_several_processes_share_a_run(measured, files):
    measured.images("scratch", "clean").unlink()
    paths = InputPaths(checkpoints=files, target=files["tuned"].parent / "photos")
    runner.run(measured.settings, paths, measured.path, Console(quiet=True), join=True)
    assert measured.images("scratch", "clean").exists()


def test_the_readmes_way_of_saving_a_network(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block("save"), {"network": network})
    found, _ = given(tmp_path / "A.safetensors")
    assert torch.equal(found.get_submodule("network").fc.weight, network.fc.weight)


def test_the_readmes_command_for_training_names_what_there_is(tmp_path, monkeypatch, micro_arguments):
    """Its plan checks all inputs and names all stages; that a plan is carried out is tested elsewhere."""
    for root in ("photos", "others"):
        photos(tmp_path / root, "train", 16)
        photos(tmp_path / root, "test", 8)
    text = block("train")
    for word, path in (("PHOTOS", tmp_path / "photos"), ("OTHERS", tmp_path / "others"), ("RUN", tmp_path / "run")):
        assert word in text
        text = text.replace(word, str(path))
    assert "torchvision:resnet34" in text
    words = shlex.split(text.replace("torchvision:resnet34", "fastlip:convnet"))  # which is built in less time
    assert words[:3] == ["python", "-m", "fastlip.study"]
    command(monkeypatch, "plan", *words[3:], *(a for a in micro_arguments if a.startswith("--set=")))
    plan = [file.name for file in sorted((tmp_path / "run" / "plan").iterdir())]
    assert plan[:2] == ["1-source.txt", "2-training.txt"]
    assert "--model fastlip:convnet" in (tmp_path / "run" / "plan" / plan[0]).read_text()


@pytest.mark.parametrize(("name", "model"), [("disjoint", "disjoint-s0"), ("constrained", "constrained-s5")])
def test_the_readmes_commands_for_arms_of_no_preset_of_one_seed(name, model, tmp_path, monkeypatch, micro_arguments):
    for root, each in (("photos", 40), ("others", 16)):
        photos(tmp_path / root, "train", each)
        photos(tmp_path / root, "test", 8)
    text = block(name).replace("\\\n", "").replace("--data DATA", f"--target {tmp_path / 'photos'}")
    text = text.replace("OTHERS", str(tmp_path / "others")).replace("RUN", str(tmp_path / "run"))
    words = [*shlex.split(text)[3:], "--model", "fastlip:convnet"]
    micro = [a for a in micro_arguments if a.startswith("--set=") and not a.startswith("--set=arms=")]
    command(monkeypatch, "plan", *words, *micro)
    training = (tmp_path / "run" / "plan" / "2-training.txt").read_text()
    assert f"--only '{model}: training*'" in training
