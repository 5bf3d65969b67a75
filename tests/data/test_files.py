import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from fastlip import data

REAL = os.environ.get("FASTLIP_DATA")
needs_data = pytest.mark.skipif(REAL is None, reason="FASTLIP_DATA names no folder with CIFAR-10")


def write_image(path: Path, value: int, size: tuple[int, int] = (32, 32)) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, (value, value, value)).save(path)


@needs_data
def test_cifar10_is_the_published_set():
    train, test = data.cifar10(REAL, train=True), data.cifar10(REAL, train=False)
    assert train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert torch.equal(torch.bincount(test.labels), torch.full((10,), 1000))
    # The channel means that everybody normalises with.
    means = train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=1e-4, rtol=0)
    assert train.classes[0] == "airplane"
    assert not train.generated


@needs_data
def test_a_damaged_file_is_named_and_not_read(tmp_path):
    source = Path(REAL) / "cifar-10-batches-py"
    copy = tmp_path / source.name
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "data_batch_3").unlink()
    (copy / "data_batch_3").write_bytes((source / "data_batch_3").read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        data.cifar10(tmp_path, train=True)


def test_missing_cifar10_names_the_file_and_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 is missing.*download") as error:
        data.cifar10(tmp_path, train=True)
    assert "\n" not in str(error.value)


def test_foreign_pickles_are_not_executed(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="damaged"):
        data.cifar10(tmp_path, train=False)
    assert not (tmp_path / "sprung").exists()


def test_image_folder_reads_classes_in_order(tmp_path):
    for i, name in enumerate(("zebra", "ape")):
        write_image(tmp_path / name / "1.png", 10 * i + 1)
        write_image(tmp_path / name / "0.png", 10 * i)
    found = data.image_folder(tmp_path)
    assert found.classes == ("ape", "zebra")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.images[:, 0, 0, 0].tolist() == [10, 11, 0, 1]
    assert found.images.shape == (4, 3, 32, 32)


def test_image_folder_resizes_the_central_square(tmp_path):
    image = pytest.importorskip("PIL.Image")
    wide = image.new("RGB", (96, 48), (255, 0, 0))
    wide.paste((0, 0, 255), (24, 0, 72, 48))
    (tmp_path / "a").mkdir()
    wide.save(tmp_path / "a" / "x.png")
    found = data.image_folder(tmp_path).images[0]
    assert found.shape == (3, 32, 32)
    assert (found[2, :, 2:-2] == 255).all()
    assert (found[0, :, 2:-2] == 0).all()


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="for each class"):
        data.image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png cannot be read"):
        data.image_folder(tmp_path)


def test_without_torchvision_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for call in (lambda: data.cifar10(tmp_path, train=True), lambda: data.image_folder(tmp_path)):
        with pytest.raises(ImportError, match=r'pip install "fastlip\[study\]"'):
            call()
