"""Data sets as folders of images, by function and by ``python -m fastlip.data``."""

import subprocess
import sys

import pytest
import torch

from fastlip.data import ImageSet, image_folder
from fastlip.data import __main__ as command


def test_a_data_set_is_written_as_a_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("PIL")
    pytest.importorskip("torchvision")
    pixels = torch.arange(6 * 3 * 16, dtype=torch.uint8).reshape(6, 3, 4, 4)
    images = ImageSet(pixels, torch.tensor([1, 0, 1, 0, 1, 0]), ("cat", "dog"), "pets")
    monkeypatch.setitem(command._NAMED, "cifar100", lambda root, train, download: images)
    command.main(["cifar100", str(tmp_path / "pets"), "--per-class", "2"])
    assert capsys.readouterr().out == f"{tmp_path / 'pets'}: 4 images of 2 classes\n"
    read = image_folder(tmp_path / "pets", 4)
    assert read.classes == ("cat", "dog")
    assert torch.equal(read.images, pixels[[1, 3, 0, 2]])
    for arguments, message in (
        (["cifar100", str(tmp_path / "pets")], "is not empty"),
        (["cifar100", str(tmp_path / "new"), "--per-class", "4"], "--per-class 4: a class has 3 images"),
    ):
        with pytest.raises(SystemExit, match=message):
            command.main(arguments)
    done = subprocess.run(
        [sys.executable, "-m", "fastlip.data", "cifar10", str(tmp_path / "x"), "--data", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: CIFAR-10: ")
    assert not (tmp_path / "x").exists()
