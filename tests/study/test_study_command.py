"""The command line: every error is one line and an exit status, nothing is lost, and no input is executed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlip.data import generated
from fastlip.models import load_checkpoint, resnet18, save_checkpoint
from fastlip.study import cli
from fastlip.study.pipeline.image_sets import GivenImages
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths, resolve_source


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process; its exit status and what it wrote to stderr."""
    monkeypatch.delenv("FASTLIP_DATA", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastlip.study", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return run


def is_one_line(found, status, *words):
    code, said = found
    assert code == status, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    for word in words:
        assert word in said


QUICK = ("--preset", "quick", "--no-download")


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.mkdir(), lambda p: p.write_text("a file")])
def test_a_wrong_directory_of_corruptions(command, tmp_path, make):
    make(tmp_path / "c")
    found = command(*QUICK, "--corruptions", tmp_path / "c", "--out", tmp_path / "run")
    is_one_line(found, 2, "--corruptions", str(tmp_path / "c"), "gaussian_noise.npy", "labels.npy")
    assert not (tmp_path / "run").exists()


def cifar10_c(folder, labels, name="gaussian_noise"):
    """A folder of CIFAR-10-C's shape."""
    folder.mkdir()
    np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "labels.npy").unlink(), "labels.npy is missing"),
        (lambda root: np.save(root / "labels.npy", np.zeros(50_000, dtype=np.int64)), "CIFAR-10's order"),
        (lambda root: (root / "gaussian_noise.npy").write_bytes(b"\x93NUMPY"), "damaged"),
        (lambda root: np.save(root / "gaussian_noise.npy", np.zeros((3, 32, 32, 3), np.uint8)), "must hold integers"),
    ],
)
def test_corruptions_that_are_not_cifar10s(command, tmp_path, monkeypatch, change, message):
    # The clean test images are stood in for, so that this runs where CIFAR-10 is not.
    clean = generated("target", "test", 10_000, 0)
    monkeypatch.setattr(GivenImages, "whole_test", clean)
    monkeypatch.setattr(Inputs, "_check_target", lambda self, begun: None)
    root = cifar10_c(tmp_path / "c", np.tile(clean.labels.numpy(), 5))
    paths = InputPaths(corruptions=root)
    settings = resolve_source(overrides.override(presets.preset("quick"), ["arms=scratch"]), paths)
    assert settings.corrupted == "cifar10c"
    Inputs(settings, paths).require_available()
    change(root)
    found = command(*QUICK, "--set=arms=scratch", "--corruptions", root, "--out", tmp_path / "run")
    is_one_line(found, 2, message)
    assert not (tmp_path / "run").exists()


def test_a_wrong_seed_is_told_by_the_option_that_was_given(command, tmp_path):
    is_one_line(command(*QUICK, "--seed", "-3", "--out", tmp_path / "run"), 2, "--seed: must be at least 0")
    is_one_line(command(*QUICK, "--set", "seeds=0", "--out", tmp_path / "run"), 2, "--set seeds: must be at least 1")


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.mkdir()])
def test_a_wrong_data_directory(command, tmp_path, make):
    make(tmp_path / "data")
    found = command(*QUICK, "--data", tmp_path / "data", "--out", tmp_path / "run")
    is_one_line(found, 2, str(tmp_path / "data"), "cifar-10-batches-py")
    assert not (tmp_path / "run").exists()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_checkpoints_that_are_wrong(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "other.safetensors", resnet18(5, seed=0))  # quick wants ResNet-50
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:5000])
    torch.save({"conv1.weight": Bomb()}, tmp_path / "code.pth")
    (tmp_path / "code.safetensors").write_bytes((tmp_path / "code.pth").read_bytes())
    for name, words in (
        ("other.safetensors", "architecture"),
        ("cut.safetensors", "cannot be read"),
        ("code.pth", "cannot be read"),
        ("code.safetensors", "cannot be read"),
        ("absent.pth", "is not a file"),
    ):
        found = command(*QUICK, "--source-checkpoint", tmp_path / name, "--out", tmp_path / "run")
        is_one_line(found, 2, "--source-checkpoint", name, words)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint_of_the_run_is_named_and_mended_by_deleting_it(
    command, finished, micro_arguments, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    checkpoint = run / "checkpoints" / "scratch-s0.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    (run / "images" / "scratch-s0" / "clean.npz").unlink()
    kept = {p: p.read_bytes() for p in run.rglob("*.npz")}
    is_one_line(command("--out", run, *micro_arguments), 1, "scratch-s0.safetensors", "delete")
    assert {p: p.read_bytes() for p in run.rglob("*.npz")} == kept
    checkpoint.unlink()
    monkeypatch.setattr(sys, "argv", ["fastlip.study", "--out", str(run), *micro_arguments])
    cli.app(standalone_mode=False)
    assert (run / "images" / "scratch-s0" / "clean.npz").exists()
    again, before = (
        load_checkpoint(path / "checkpoints" / "scratch-s0.safetensors")[0] for path in (run, finished.path)
    )
    assert all(torch.equal(value, again[name]) for name, value in before.items())


def test_a_checkpoint_of_another_network_in_the_run(command, finished, micro_arguments, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    save_checkpoint(run / "checkpoints" / "scratch-s0.safetensors", resnet18(3, stem="cifar", seed=0))
    (run / "images" / "scratch-s0" / "clean.npz").unlink()
    is_one_line(command("--out", run, *micro_arguments), 1, "holds another network", "delete it")


@pytest.mark.parametrize("damage", ["results.json", "config.json"])
def test_a_report_from_damaged_files(command, finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    (run / damage).write_text((run / damage).read_text()[:100])
    report = (run / "report.html").read_bytes()
    is_one_line(command("report", run), 1, damage, "damaged")
    assert (run / "report.html").read_bytes() == report


def test_a_full_disk_is_one_line_and_what_was_done_stays(tmp_path, micro_arguments):
    """RLIMIT_FSIZE stands for the full disk: the checkpoint, the first large file, cannot be written."""
    program = (
        "import resource, runpy, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7));"
        "sys.argv[0] = 'fastlip.study'; runpy.run_module('fastlip.study', run_name='__main__')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, "--out", str(tmp_path / "run"), *micro_arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert "run the same command again" in found.stderr
    assert found.stderr.count("\n") == 1
    assert (tmp_path / "run" / "config.json").exists()
    assert [p.name for p in (tmp_path / "run").rglob("*source*")] == []


@pytest.mark.parametrize(
    ("sent", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interruption_is_one_line_and_what_was_done_stays(micro_arguments, tmp_path, sent, status, word):
    arguments = [sys.executable, "-m", "fastlip.study", "--out", str(tmp_path / "run"), *micro_arguments]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell may have them ignore the signal.
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
    )
    while not (tmp_path / "run/checkpoints/source.safetensors").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    is_one_line((process.returncode, said), status, word, "same command again")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "source.safetensors")[0]
    assert not list((tmp_path / "run").rglob("*.part*"))


def test_a_directory_that_may_not_be_written(command, micro_arguments, tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(os, "open", refused)
    is_one_line(command("--out", tmp_path / "run", *micro_arguments), 1, "Permission denied", "same command again")


def test_a_full_gpu(command, monkeypatch, tmp_path):
    from fastlip.study.pipeline import runner

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it.")

    monkeypatch.setattr(runner, "run", full)
    is_one_line(command("--preset", "demo", "--out", tmp_path), 1, "CUDA out of memory", "smaller batches")
