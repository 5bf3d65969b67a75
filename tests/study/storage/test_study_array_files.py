"""Arrays of another kind or shape than a stage wrote are refused in one line that names the file."""

import numpy as np
import pytest

from fastlip.study.errors import StudyError
from fastlip.study.storage.array_files import read_corruptions, read_measured, read_transfer, read_transfer_images
from fastlip.study.storage.files import write_arrays

NUMBERS = np.zeros(4, dtype=np.int64)
CROSSED = np.zeros((3, 2, 4))

CORRUPTIONS = {
    "corruption": np.array(["fog", "snow", "blur"]),
    "severity": np.array([1, 5]),
    "label": NUMBERS,
    "clean_prediction": NUMBERS,
    "prediction": CROSSED.astype(np.int64),
    "distortion": CROSSED,
    "stretch": CROSSED,
}
TRANSFER = {
    "source": np.array(["a", "b", "c"]),
    "strength": np.array([0.5, 1.0]),
    "label": NUMBERS,
    "prediction": CROSSED.astype(np.int64),
    "noise_prediction": CROSSED.astype(np.int64),
}
IMAGES = {
    "id": NUMBERS,
    "label": NUMBERS,
    "perturbed": np.zeros((4, 2, 3, 8, 8), dtype=np.float32),
    "l2": np.zeros((4, 2)),
}
SMALLEST = {"label": NUMBERS, "prediction": NUMBERS, "found": np.ones(4, dtype=bool)} | {
    name: np.zeros(4) for name in ("distortion", "stretch", "l2", "ceiling")
}

READERS = {
    "corruptions": (read_corruptions, CORRUPTIONS),
    "transfer": (read_transfer, TRANSFER),
    "transfer-images": (lambda path: read_transfer_images(path, 2), IMAGES),
    "smallest-pgd": (read_measured, SMALLEST),
}
READ = [(kind, name) for kind, (_, arrays) in READERS.items() for name in arrays if name != "id"]


def refused(path, read, arrays, message):
    write_arrays(path, arrays)
    with pytest.raises(StudyError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\\n" not in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
def test_what_was_written_is_read(tmp_path, kind):
    read, arrays = READERS[kind]
    path = tmp_path / f"{kind}.npz"
    write_arrays(path, arrays)
    found = read(path)
    assert set(found) == set(arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(("kind", "name"), READ)
def test_a_missing_array_is_named(tmp_path, kind, name):
    read, arrays = READERS[kind]
    rest = {key: values for key, values in arrays.items() if key != name}
    refused(tmp_path / f"{kind}.npz", read, rest, f"damaged .*it has no '{name}'")


@pytest.mark.parametrize(("kind", "name"), READ)
def test_an_array_of_another_kind_or_shape_is_refused(tmp_path, kind, name):
    read, arrays = READERS[kind]
    values = arrays[name]
    for wrong in (np.zeros(values.shape, dtype=complex), values[..., None], values[:0]):
        refused(tmp_path / f"{kind}.npz", read, arrays | {name: wrong}, "is damaged")
    if values.ndim > 1:
        refused(tmp_path / f"{kind}.npz", read, arrays | {name: values[:, :1]}, f"'{name}' is .* of shape")


def test_images_at_another_number_of_norms_are_refused(tmp_path):
    path = tmp_path / "transfer-images.npz"
    refused(path, lambda path: read_transfer_images(path, 3), IMAGES, "'l2' is float64 of shape")
