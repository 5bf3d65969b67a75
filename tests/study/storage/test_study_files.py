import os

import numpy as np
import pytest

from fastlip.study.errors import StudyError
from fastlip.study.storage import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})

    def fail_halfway():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert files.read_json(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    def full():
        with files.replacing(tmp_path / "a.json"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*a\.json") as caught:
        full()
    assert caught.value.filename == str(tmp_path / "a.json")


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", [float("nan")])
    assert not (tmp_path / "a.json").exists()


def test_arrays_survive(tmp_path):
    arrays = {"a": np.arange(3), "b": np.array([np.inf, 1.0]), "c": np.array([True, False])}
    files.write_arrays(tmp_path / "a.npz", arrays)
    found = files.read_arrays(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(found[name], arrays[name])
        assert found[name].dtype == arrays[name].dtype


@pytest.mark.parametrize("keep", [0, 10, 150])
def test_a_truncated_archive_is_one_line(tmp_path, keep):
    path = tmp_path / "a.npz"
    files.write_arrays(path, {"a": np.arange(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StudyError, match=r"a\.npz is damaged"):
        files.read_arrays(path)


def test_what_is_no_archive_is_not_said_to_be_loaded_otherwise(tmp_path):
    (tmp_path / "a.npz").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(StudyError, match="no archive") as caught:
        files.read_arrays(tmp_path / "a.npz")
    assert "pickle" not in str(caught.value)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(StudyError, match="damaged"):
        files.read_arrays(tmp_path / "a.npz")


def test_damaged_json_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"n": ')
    with pytest.raises(StudyError, match=r"a\.json is damaged"):
        files.read_json(tmp_path / "a.json")
