"""Images of one's own: any of the names for the target and for the source, checked before anything is written."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastlip.data import generated
from fastlip.study import cli
from fastlip.study.errors import StudyError
from fastlip.study.pipeline import image_sets
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths, absolute, dataset_of, resolve_source


def folder(root, each=10, size=40, classes=("cat", "dog", "emu")):
    """Random images, as many of each class, which the study splits itself."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


SMALL = ["examples=1", "arms=scratch", "scratch.images=12", "evaluation.images=3", "evaluation.clean_images=6"]


def inputs(*assignments, preset="quick", **given):
    settings = overrides.override(presets.preset(preset), [*SMALL, *assignments])
    paths = InputPaths(**given)
    return Inputs(resolve_source(settings, paths), paths)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_names_of_data_sets_go_before_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert dataset_of(name, "--target") == absolute(name) == name
    assert dataset_of(f"./{name}", "--target") == "folder"
    assert absolute(f"./{name}") == str(tmp_path / name)


def test_a_data_set_of_hugging_face_is_one_of_the_hub_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dataset_of("hf:zalando/fashion", "--target") == absolute("hf:zalando/fashion") == "hf:zalando/fashion"
    (tmp_path / "pets").mkdir()
    assert dataset_of("hf:./pets", "--target") == "hf:pets"
    assert absolute("hf:./pets") == f"hf:{tmp_path / 'pets'}"


@pytest.mark.parametrize("given", ["cifar", "hf:", "/nowhere/at/all"])
def test_an_unknown_target_names_the_known_ones(given):
    with pytest.raises(StudyError, match="is not a folder, nor cifar10, cifar100, svhn or hf:NAME") as caught:
        inputs(target=given)
    assert caught.value.status == 2


def test_a_folder_is_a_target_of_any_size_and_number_of_classes(tmp_path):
    root = folder(tmp_path / "pets")
    found = inputs("image_size=16", target=root)
    found.require_available()
    assert found.settings.dataset == "folder"
    train, test = found.target_train("scratch"), found.target_clean
    assert train.images.shape == (12, 3, 16, 16)
    assert test.images.shape == (6, 3, 16, 16)
    assert test.classes == ("cat", "dog", "emu")
    pixels = [{image.numpy().tobytes() for image in part.images} for part in (train, test)]
    assert len(pixels[0] | pixels[1]) == 18
    attacked = {image.numpy().tobytes() for image in found.target_attacked.images}
    assert attacked < pixels[1]
    assert test.name.startswith("pets (split by fastlip")


def test_a_folder_is_known_by_names_and_sizes(tmp_path):
    root = folder(tmp_path / "pets")
    before = inputs(target=root).fingerprints()["target"]
    moved = root.rename(tmp_path / "elsewhere")
    assert inputs(target=moved).fingerprints()["target"] == before
    (moved / "cat" / "0.png").write_bytes(b"another size")
    assert inputs(target=moved).fingerprints()["target"] != before


def test_a_target_of_hugging_face(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})

    def part(n):
        images = [Image.new("RGB", (20, 30), (i, 0, 0)) for i in range(n)]
        return library.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(n)]}, features=features)

    library.DatasetDict(train=part(12), test=part(8)).save_to_disk(tmp_path / "pets")
    found = inputs(target=f"hf:{tmp_path / 'pets'}")
    found.require_available()
    assert found.settings.dataset == "hf:pets"
    assert found.target_train("scratch").images.shape == (12, 3, 32, 32)
    assert found.target_clean.classes == ("a", "b")
    assert found.fingerprints()["target"].startswith("labels and sizes, sha256 ")


def test_svhn_and_cifar100_are_read_from_the_data_folder(tmp_path, monkeypatch):
    """Their readers are tested with the data package; here that they are asked for the right part."""
    asked = []

    def read(root, train, download=False):
        asked.append((root, train))
        return generated("target", "train" if train else "test", 120)

    for name in ("cifar100", "svhn"):
        monkeypatch.setitem(image_sets._NAMED, name, image_sets._NAMED[name]._replace(read=read))
        found = inputs(target=name, data=tmp_path)
        found.require_available()
        assert set(asked) == {(tmp_path, True), (tmp_path, False)}
        assert found.fingerprints()["target"].endswith(", MD5 checked")
        asked.clear()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("scratch.images=30", r"scratch has 30 training images: n = 30 images balanced over 3 classes .* has 8"),
        ("evaluation.clean_images=9", r"evaluation\.clean_images=9: n = 9 .*a class has 2"),
    ],
)
def test_too_few_images_name_the_setting(tmp_path, assignment, message):
    with pytest.raises(StudyError, match=message) as caught:
        inputs(assignment, target=folder(tmp_path / "pets")).require_available()
    assert caught.value.status == 2


def test_images_of_a_fixed_size_are_not_resized():
    resolve_source(overrides.override(presets.preset("quick"), ["image_size=32"]), InputPaths())
    with pytest.raises(StudyError, match="cifar10 has images of 32x32; scale enlarges them in the model"):
        inputs("image_size=64")


def test_a_damaged_image_stops_a_run_before_it_begins(tmp_path):
    root = folder(tmp_path / "pets")
    for path in (root / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    found = inputs(target=root)
    with pytest.raises(StudyError, match=r"scratch has 12 training images: image .*cat.* cannot be read") as caught:
        found.require_available()
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)


def test_a_run_that_was_begun_does_not_read_its_training_images_again(tmp_path, monkeypatch):
    found = inputs(target=folder(tmp_path / "pets"), source_data=folder(tmp_path / "others"))
    parts = []
    whole = image_sets.GivenImages.images
    monkeypatch.setattr(
        image_sets.GivenImages, "images", lambda self, part, *n: parts.append(part) or whole(self, part, *n)
    )
    found.require_available(begun=True)
    assert set(parts) == {"test"}


def test_the_source_is_named_like_the_target(tmp_path):
    root = folder(tmp_path / "pets")
    for part in ("train", "test"):
        folder(tmp_path / "others" / part, each=4 if part == "train" else 1)
    found = inputs(
        "arms=finetune", "finetune.images=12", "pretrain.images=12", target=root, source_data=str(tmp_path / "others")
    )
    assert found.settings.source == "folder"
    assert len(found.source_train) == 12  # all of its training images and none of its test images
    assert found.source_name == "pre-training on 12 images of others"
    with pytest.raises(StudyError, match="the same images"):
        inputs(target=root, source_data=f"{root}/")
    with pytest.raises(StudyError, match="the same images"):
        inputs(source_data="cifar10")
    assert inputs(source_data="cifar100").settings.source == "cifar100"
    assert inputs("arms=finetune", source_data="hf:a/b").settings.pretrains


def test_a_whole_folder_is_for_training_where_it_is_the_source(tmp_path):
    found = inputs("arms=finetune", "pretrain.images=30", source_data=folder(tmp_path / "pets"))
    assert len(found.source_train) == 30


def test_published_corruptions_are_those_of_cifar10(tmp_path):
    with pytest.raises(StudyError, match="for --target cifar10"):
        inputs(target="cifar100", corruptions=tmp_path)


def test_a_preset_with_generated_images_takes_no_target():
    with pytest.raises(StudyError, match="leave out --data, --target"):
        resolve_source(presets.preset("demo"), InputPaths(target="cifar10"))


def test_a_library_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "pets").mkdir()
    with pytest.raises(StudyError, match=r'pip install "fastlip\[hub\]"') as caught:
        inputs(target=f"hf:{tmp_path / 'pets'}").require_available()
    assert caught.value.status == 2


def test_a_plan_names_inputs_by_absolute_paths(tmp_path, monkeypatch):
    folder(tmp_path / "pets")
    folder(tmp_path / "others")
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--preset", "quick", "--model", "torchvision:resnet18", "--target", "pets", "--out", "run"]
    arguments += ["--source-data", "others", *(f"--set={assignment}" for assignment in SMALL)]
    monkeypatch.setattr(sys, "argv", ["fastlip.study", *arguments])
    cli.app(standalone_mode=False)
    for file in (tmp_path / "run" / "plan").iterdir():
        line = file.read_text().splitlines()[0]
        assert f"--target {tmp_path / 'pets'}" in line
        assert f"--source-data {tmp_path / 'others'}" in line
        assert "--model torchvision:resnet18" in line


def test_no_download_reaches_the_libraries_of_hugging_face(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(
        sys, "argv", ["fastlip.study", "plan", "--preset", "demo", "--no-download", "--out", str(tmp_path)]
    )
    monkeypatch.setattr("fastlip.study.pipeline.plan.write_plan", lambda *arguments: [])
    cli.app(standalone_mode=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "imagenet"}, "dataset"),
        ({"dataset": "hf:"}, "dataset"),
        ({"source": "cifar"}, "source"),
        ({"image_size": 4}, "image_size"),
        ({"normalize": "0.5,0.5/1,1"}, "normalize"),
        ({"normalize": "0,0,0/1,1,0"}, "normalize"),
        ({"normalize": "0,0,nan/1,1,1"}, "normalize"),
        ({"models": ("torchvision:resnet18",)}, "models"),
        ({"arms": (), "checkpoints": ("a",), "seeds": 2}, "seeds"),
        ({"arms": (), "checkpoints": ("a", "A")}, "checkpoints"),
        ({"arms": (), "checkpoints": ("a/b",)}, "checkpoints"),
        ({"arms": (), "checkpoints": ("a*",)}, "checkpoints"),
        ({"arms": (), "checkpoints": ()}, "arms"),
        ({"checkpoints": ("a",)}, "arms"),
    ],
)
def test_settings_of_images_and_checkpoints_are_checked(changes, message):
    with pytest.raises(StudyError, match=f"--set {message}") as caught:
        replace(presets.preset("quick"), **changes)
    assert caught.value.status == 2


def test_splits_leave_the_global_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    inputs(target=folder(tmp_path / "pets")).require_available()
    assert torch.equal(before, torch.random.get_rng_state())
