"""Sets of images other than CIFAR-10: read as published, split the same way everywhere, and refused in one line."""

import hashlib
import os
import pickle
import sys
import types
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fastlip import data

Image = pytest.importorskip("PIL.Image")
torchvision = pytest.importorskip("torchvision")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A folder of four images in CIFAR-100's form, whose checksums torchvision takes for the published ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072).astype(np.uint8)
    for name in ("train", "test"):
        rows = pixels if name == "train" else pixels[:2]
        part = {"data": rows, "fine_labels": [0, 1, 2, 0][: len(rows)], "coarse_labels": [9] * len(rows)}
        (folder / name).write_bytes(pickle.dumps(part))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear", "can"]}))
    published = torchvision.datasets.CIFAR100
    monkeypatch.setattr(published, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(published, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(published, "meta", published.meta | {"md5": md5(folder / "meta")})
    return tmp_path


def test_cifar100_has_its_fine_labels(cifar100):
    found = data.cifar100(cifar100, train=True)
    assert (found.name, found.classes, found.labels.tolist()) == ("CIFAR-100", ("apple", "bear", "can"), [0, 1, 2, 0])
    assert found.images.shape == (4, 3, 32, 32)
    assert found.images[0, 0, 0, :3].tolist() == [0, 1, 2]
    assert found.images[0, 1, 0, 0] == 1024 % 256
    assert len(data.cifar100(cifar100, train=False)) == 2


def test_a_file_of_cifar100_that_is_damaged_or_missing(cifar100):
    (cifar100 / "cifar-100-python" / "test").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"CIFAR-100: a file in .* is damaged"):
        data.cifar100(cifar100, train=True)
    (cifar100 / "cifar-100-python" / "test").unlink()
    with pytest.raises(FileNotFoundError, match=r"CIFAR-100: .*test is missing; .*cifar-100-python.tar.gz"):
        data.cifar100(cifar100, train=True)


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Files of three images in SVHN's form, whose checksums torchvision takes for the published ones."""
    matlab = pytest.importorskip("scipy.io")
    pixels = np.zeros((32, 32, 3, 3), dtype=np.uint8)
    pixels[5, 7, 1] = (10, 20, 30)
    files = {}
    for split in ("train", "test"):
        file = tmp_path / f"{split}_32x32.mat"
        matlab.savemat(file, {"X": pixels, "y": np.array([[10], [1], [9]], dtype=np.uint8)})
        files[split] = ["", file.name, md5(file)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", files)
    return tmp_path


def test_svhn_has_digits_as_classes(svhn):
    found = data.svhn(svhn, train=False)
    assert (found.name, found.classes, found.labels.tolist()) == ("SVHN", tuple("0123456789"), [0, 1, 9])
    assert found.images.shape == (3, 3, 32, 32)
    assert found.images[:, 1, 5, 7].tolist() == [10, 20, 30]


def test_a_file_of_svhn_that_is_damaged_or_missing(svhn):
    (svhn / "train_32x32.mat").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"SVHN: .*train_32x32.mat is damaged"):
        data.svhn(svhn, train=True)
    (svhn / "train_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"SVHN: .*train_32x32.mat is missing"):
        data.svhn(svhn, train=True)


def test_the_statistics_are_those_of_the_training_images():
    root = os.environ.get("FASTLIP_DATA")
    if root is None:
        pytest.skip("FASTLIP_DATA names no folder with CIFAR-10")
    pixels = data.cifar10(root, train=True).images[::10].float() / 255
    mean, std = data.CHANNEL_STATISTICS["cifar10"]
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=5e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(std, abs=5e-3)


def write(path: Path, value: object = (1, 2, 3), mode: str = "RGB", size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value).save(path)


def folder(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    """Images under root/<split>/<class>/; their red channel is their number within the class."""
    for split, classes in splits.items():
        for name, count in classes.items():
            for i in range(count):
                write(root / split / name / f"{i:03}.png", (i, 0, 0))
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_with_its_own_split(tmp_path, test):
    root = folder(tmp_path / "pets", {"train": {"cat": 3, "dog": 2}, test: {"cat": 1, "dog": 1}})
    found = {split: data.image_folder(root, 8, split) for split in ("train", "test")}
    assert [len(found[split]) for split in found] == [5, 2]
    assert found["test"].classes == ("cat", "dog")
    assert found["test"].name == "pets"
    assert len(data.image_folder(root, 8)) == 5


def test_a_folder_of_classes_is_split_by_a_seed_and_says_so(tmp_path):
    root = folder(tmp_path / "pets", {"": {"cat": 20, "dog": 7, "train": 2}})
    train, test = (data.image_folder(root, 8, split) for split in ("train", "test"))
    assert torch.bincount(test.labels).tolist() == [4, 1, 1]
    assert torch.bincount(train.labels).tolist() == [16, 6, 1]
    for label in range(3):
        numbers = [part.images[part.labels == label][:, 0, 0, 0].tolist() for part in (train, test)]
        assert sorted(numbers[0] + numbers[1]) == list(range((20, 7, 2)[label]))
        assert all(n == sorted(n) for n in numbers)
    assert numbers_of_cats(test) != [0, 1, 2, 3]  # not the first of each class, which may be of one kind
    assert train.name == test.name
    assert "split by fastlip, seed 0, a fifth of each class for testing" in test.name
    again = data.image_folder(root, 8, "test")
    assert torch.equal(again.images, test.images)


def numbers_of_cats(images: data.ImageSet) -> list[int]:
    return images.images[images.labels == 0][:, 0, 0, 0].tolist()


def test_so_many_images_of_a_folder_are_those_of_the_whole(tmp_path):
    root = folder(tmp_path, {"": {"a": 12, "b": 12}})
    whole = data.image_folder(root, 8)
    for n, after in ((6, 0), (8, 6)):
        some = data.image_folder(root, 8, n=n, after=after)
        wanted = whole.balanced(n, after=after)
        assert torch.equal(some.images, wanted.images)
        assert torch.equal(some.labels, wanted.labels)
    (root / "a" / "000.png").write_bytes(b"never read")
    unread = [n for n in range(2, 12, 2) if 0 not in numbers_of_cats(whole.balanced(n))]
    assert unread
    assert len(data.image_folder(root, 8, n=unread[-1])) == unread[-1]
    with pytest.raises(ValueError, match=r"n = 30 images balanced over 2 classes are more than .* has: a class has 12"):
        data.image_folder(root, 8, n=30)


@pytest.mark.parametrize(
    ("splits", "split", "message"),
    [
        ({"train": {"cat": 2}, "test": {"cat": 1, "emu": 1}}, "train", "class emu is in test and not in train"),
        ({"train": {"cat": 2, "emu": 1}, "val": {"cat": 1}}, "test", "class emu is in train and not in val"),
        ({"": {"cat": 5, "emu": 1}}, "train", "class emu has 1 images, too few"),
    ],
)
def test_classes_that_do_not_fit(tmp_path, splits, split, message):
    with pytest.raises(ValueError, match=message):
        data.image_folder(folder(tmp_path, splits), 8, split)


def test_parts_that_are_missing(tmp_path):
    root = folder(tmp_path / "a", {"train": {"cat": 2}})
    with pytest.raises(FileNotFoundError, match="must hold a folder test or val beside train"):
        data.image_folder(root, 8, "test")
    root = folder(tmp_path / "b", {"test": {"cat": 2}})
    assert len(data.image_folder(root, 8, "test")) == 2
    with pytest.raises(FileNotFoundError, match="must hold a folder train beside test"):
        data.image_folder(root, 8, "train")
    (root / "test" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="dog"):
        data.image_folder(root, 8, "test")


def test_grey_and_transparent_images_become_three_channels(tmp_path):
    write(tmp_path / "a" / "0.png", 7, "L")
    write(tmp_path / "a" / "1.png", (1, 2, 3, 0), "RGBA")
    write(tmp_path / "a" / "2.png", 1, "1")
    found = data.image_folder(tmp_path, 8)
    assert found.images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("F", "tiff")])
def test_deeper_pixels_are_refused_and_not_clipped(tmp_path, mode, suffix):
    write(tmp_path / "a" / f"0.{suffix}", 300, mode)
    with pytest.raises(ValueError, match=rf"0\.{suffix} cannot be read: .*more than 8 bits"):
        data.image_folder(tmp_path, 8)


def test_a_truncated_image_is_named(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a" / "0.png"
    path.parent.mkdir()
    Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"0\.png cannot be read"):
        data.image_folder(tmp_path, 8)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library datasets, with its cache in a folder of its own and without a network."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    return library


def table(hub, count: int, **more):
    """Images whose red channel is their number, with labels 0, 1, 0, ..."""
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]
    columns = {"picture": images, "kind": [i % 2 for i in range(count)], "id": list(range(count))} | more
    types = {"picture": hub.Image(), "kind": hub.ClassLabel(names=["cat", "dog"]), "id": hub.Value("int32")}
    types |= {name: hub.ClassLabel(names=["x", "y"]) for name in more}
    return hub.Dataset.from_dict(columns, features=hub.Features(types))


@pytest.mark.parametrize("form", ["saved", "parquet"])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_data_set_of_hugging_face_in_a_folder(hub, tmp_path, form, test, capfd):
    parts = hub.DatasetDict({"train": table(hub, 10), test: table(hub, 4)})
    root = tmp_path / "pets"
    if form == "saved":
        parts.save_to_disk(root)
    else:
        root.mkdir()
        for name, part in parts.items():
            part.to_parquet(root / f"{name}-00000-of-00001.parquet")
    capfd.readouterr()
    found = data.hugging_face(str(root), 8, "test")
    assert (found.name, found.classes, found.labels.tolist()) == ("pets", ("cat", "dog"), [0, 1, 0, 1])
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    train = data.hugging_face(str(root), 8, "train")
    assert torch.equal(data.hugging_face(str(root), 8, "train", n=4).images, train.balanced(4).images)
    assert capfd.readouterr().err == ""  # no progress bars
    other = tmp_path / "other"
    hub.DatasetDict({"train": table(hub, 10), test: table(hub, 5)}).save_to_disk(other)
    prints = [data.hugging_face_fingerprint(str(path)) for path in (root, other)]
    assert prints[0] != prints[1]
    assert prints[0] == data.hugging_face_fingerprint(str(root))


def test_a_data_set_with_one_split_is_split_by_a_seed(hub, tmp_path):
    table(hub, 20).save_to_disk(tmp_path / "pets")
    train, test = (data.hugging_face(str(tmp_path / "pets"), 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    numbers = torch.cat([train.images, test.images])[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(20))
    assert "split by fastlip" in test.name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda hub: table(hub, 4).remove_columns("kind"), r"it has picture \(Image\), id \(Value\)"),
        (lambda hub: table(hub, 4, other=[0] * 4), r"kind \(ClassLabel\), id \(Value\), other \(ClassLabel\)"),
        (lambda hub: hub.DatasetDict(train=table(hub, 4), more=table(hub, 4)), "expected test or validation"),
    ],
    ids=["no labels", "two labels", "splits"],
)
def test_a_data_set_of_another_form_says_what_there_is(hub, tmp_path, make, message):
    make(hub).save_to_disk(tmp_path / "pets")
    with pytest.raises(ValueError, match=message) as caught:
        data.hugging_face(str(tmp_path / "pets"), 8, "test")
    assert "\n" not in str(caught.value)


def test_labels_that_are_kept_back(hub, tmp_path):
    hidden = table(hub, 4).map(lambda row: row | {"kind": -1})
    hub.DatasetDict(train=table(hub, 4), test=hidden).save_to_disk(tmp_path / "pets")
    with pytest.raises(ValueError, match="images without a label"):
        data.hugging_face(str(tmp_path / "pets"), 8, "test")


def test_a_broken_image_in_a_data_set(hub, tmp_path):
    features = hub.Features({"picture": hub.Image(), "kind": hub.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [{"bytes": b"no image", "path": None}] * 10, "kind": [0, 1] * 5}
    hub.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "pets")
    with pytest.raises(ValueError, match="image 0 cannot be read"):
        data.hugging_face(str(tmp_path / "pets"), 8, "train")


def test_a_data_set_that_is_not_there_or_is_something_else(hub, tmp_path):
    with pytest.raises(OSError, match=r"data set nobody/nothing: .*nobody/nothing"):
        data.hugging_face("nobody/nothing")
    for folder in ("./nowhere", "../nowhere", str(tmp_path / "nowhere"), "~/nowhere"):
        with pytest.raises(OSError, match=r"nowhere: there is no such folder$"):
            data.hugging_face(folder)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.parquet").write_bytes(b"something else")
    with pytest.raises((OSError, ValueError), match="data set"):
        data.hugging_face(str(tmp_path / "a"))


def test_code_beside_a_data_set_is_not_executed(hub, tmp_path):
    root = tmp_path / "pets"
    root.mkdir()
    (root / "pets.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).touch()")
    with pytest.raises((OSError, ValueError), match="data set"):
        data.hugging_face(str(root))
    assert not (tmp_path / "sprung").exists()


def test_libraries_that_are_missing_or_execute_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastlip\[hub\]"'):
        data.hugging_face("pets")
    old = types.ModuleType("datasets")
    old.__version__ = "3.6.0"
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(ImportError, match=r"datasets 3\.6\.0 executes the code"):
        data.hugging_face("pets")


@pytest.mark.parametrize(("name", "file"), [("cifar100", "cifar-100-python.tar.gz"), ("svhn", "test_32x32.mat")])
def test_a_download_that_fails_says_of_what_and_what_to_do(tmp_path, monkeypatch, name, file):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(OSError, match=rf"could not be downloaded into .*\(.*not known.*\); .*{file} there") as error:
        getattr(data, name)(tmp_path, train=False, download=True)
    assert "\n" not in str(error.value)
