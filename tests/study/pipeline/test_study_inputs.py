"""Missing or unsuitable inputs are reported in one line, with status 2, before anything is written."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlip.models import resnet18, save_checkpoint
from fastlip.study.errors import StudyError
from fastlip.study.pipeline import runner
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths, resolve_source

CIFAR10 = os.environ.get("FASTLIP_DATA")


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fastlip.study", *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "FASTLIP_DATA"} | environment,
        timeout=300,
    )


def test_quick_without_network_and_files_names_three_ways_out(tmp_path):
    found = command(
        "--preset",
        "quick",
        "--no-download",
        "--out",
        str(tmp_path / "run"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        TORCH_HOME=str(tmp_path / "torch"),
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    for way in ("--data", "--source-checkpoint", "--source-data"):
        assert way in found.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache" / "fastlip").exists()


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    with pytest.raises(StudyError, match="--source-checkpoint FILE") as caught:
        runner.run(presets.preset("quick"), InputPaths(), tmp_path / "run")
    assert caught.value.status == 2
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache" / "fastlip").exists()


def test_help_documents_every_setting():
    found = command("--help")
    assert found.returncode == 0
    for name in ("pgd.steps", "scratch.max_lr", "rules.confidence", "--source-data", "--no-download"):
        assert name in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a preset"),
        (("--preset", "demo", "--set", "pgd.stepz=1"), "no such setting"),
        (("report", "nowhere"), "config.json is missing"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message, tmp_path):
    found = command(*arguments)
    assert found.returncode != 0
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def folder(root, classes=3, each=4):
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(root / f"class{c}" / f"{i}.png")
    return root


def inputs(**paths):
    settings = replace(presets.preset("quick"), model="torchvision:resnet18", arms=("finetune",))
    settings = overrides.override(settings, ["pretrain.images=12"])
    paths = InputPaths(**paths)
    return Inputs(resolve_source(settings, paths), paths)


def test_a_source_folder_gives_its_images_and_a_fingerprint_of_them(tmp_path):
    found = inputs(source_data=folder(tmp_path / "images"))
    found._check_source(begun=False)
    assert len(found.source_train) == 12
    before = found.fingerprints()["source"]
    (tmp_path / "images" / "class0" / "0.png").write_bytes(b"")
    assert found.fingerprints()["source"] != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent", "is not a folder"),
        (lambda root: folder(root / "images", each=3), "pretrain.images=12: n = 12 images .* a class has 3"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "--source-data"),
    ],
)
def test_a_wrong_source_folder_is_one_line(tmp_path, make, message):
    with pytest.raises(StudyError, match=message) as caught:
        inputs(source_data=make(tmp_path))._check_source(begun=False)
    assert caught.value.status == 2


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_source_checkpoint_is_taken_from_safetensors_or_a_torch_file(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    model = resnet18(5, seed=0)
    if suffix == ".pth":
        torch.save({"state_dict": model.get_submodule("network").state_dict()}, path)
    else:
        save_checkpoint(path, model)
    found = inputs(source_checkpoint=path)
    found._check_source(begun=False)
    weight = next(v for k, v in found.source_weights().items() if k.endswith("conv1.weight") and "layer" not in k)
    assert torch.equal(weight, model.get_submodule("network").conv1.weight)
    assert found.fingerprints()["source"].startswith("sha256 ")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_checkpoint_with_code_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(StudyError, match="cannot be read"):
        inputs(source_checkpoint=tmp_path / "bomb.pth")._check_source(begun=False)
    assert not (tmp_path / "exploded").exists()


def test_wrong_checkpoints_are_one_line(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", resnet18(5, stem="cifar", seed=0))
    with pytest.raises(StudyError, match="architecture, stem"):
        inputs(source_checkpoint=tmp_path / "a.safetensors")._check_source(begun=False)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
    with pytest.raises(StudyError, match="cannot be read"):
        inputs(source_checkpoint=tmp_path / "b.safetensors")._check_source(begun=False)
    with pytest.raises(StudyError, match="not a file"):
        inputs(source_checkpoint=tmp_path / "absent.pth")._check_source(begun=False)


def test_files_are_refused_where_images_are_generated(tmp_path):
    with pytest.raises(StudyError, match="generates its images"):
        resolve_source(presets.preset("demo"), InputPaths(source_data=tmp_path))


@pytest.mark.skipif(not CIFAR10, reason="FASTLIP_DATA does not name the folder that holds cifar-10-batches-py")
def test_quick_on_real_images(micro, tmp_path):
    settings = replace(micro, preset="quick", dataset="cifar10", source="imagenet")
    paths = InputPaths(data=Path(CIFAR10), source_data=folder(tmp_path / "images", classes=4, each=12), download=False)
    run = runner.run(settings, paths, tmp_path / "run")
    html = run.report.read_text()
    assert "GENERATED" not in html
    assert "on CIFAR-10, 18 attacked test images" in html


def test_an_out_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    found = command("--preset", "demo", "--out", str(tmp_path / "file" / "run"))
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
