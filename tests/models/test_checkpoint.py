import os
import pickle

import pytest
import torch
from torch import nn

from fastlip import models


@pytest.fixture
def saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    path = tmp_path / "weights.safetensors"
    models.save_checkpoint(path, model, {"arm": "scratch", "seed": "3"})
    return path, model


def test_round_trip(saved):
    path, model = saved
    state, meta = models.load_checkpoint(path)
    assert meta == {"arm": "scratch", "seed": "3"}
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) and v.dtype == expected[k].dtype for k, v in state.items())
    assert os.listdir(path.parent) == [path.name]


def test_tied_weights_are_kept_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    models.save_checkpoint(tmp_path / "tied.safetensors", model)
    state, _ = models.load_checkpoint(tmp_path / "tied.safetensors")
    assert torch.equal(state["0.weight"], model[0].weight)
    assert torch.equal(state["1.weight"], model[0].weight)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_an_error(saved, kept):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated") as error:
        models.load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_refused_and_not_executed(tmp_path, legacy):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "weights.pt"
    torch.save({"weight": Trap()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="is a pickle"):
        models.load_checkpoint(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is a pickle"):
        models.load_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        models.load_checkpoint(tmp_path / "none.safetensors")


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        models.save_checkpoint(path, nn.Linear(2, 2))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_meta_must_be_strings(saved):
    path, model = saved
    with pytest.raises(TypeError, match="meta must map"):
        models.save_checkpoint(path, model, {"seed": 3})


def test_a_changed_byte_is_an_error_wherever_it_is(saved):
    path, model = saved
    whole = path.read_bytes()
    before, changed = model.state_dict(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            state, _ = models.load_checkpoint(path)
        except ValueError:
            changed += 1
            continue
        # Where the name of the SHA-256 itself was hit, nothing can be checked, and no weight was hit.
        assert whole.find(b"fastlip.sha256") <= at < whole.find(b"fastlip.sha256") + 14
        assert all(torch.equal(value, state[name]) for name, value in before.items())
    assert changed >= len(whole) - 14


def test_a_file_without_a_digest_loads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors", {"arm": "scratch"})
    state, meta = models.load_checkpoint(tmp_path / "plain.safetensors")
    assert meta == {"arm": "scratch"}
    assert torch.equal(state["weight"], torch.ones(2))


def test_every_dtype_and_shape_has_a_digest(tmp_path):
    model = nn.Module()
    values = {"a": torch.tensor(3), "b": torch.zeros(0, 2), "c": torch.tensor([True]), "d": torch.ones(2).bfloat16()}
    for name, value in values.items():
        model.register_buffer(name, value)
    models.save_checkpoint(tmp_path / "a.safetensors", model)
    state, meta = models.load_checkpoint(tmp_path / "a.safetensors")
    assert meta == {}
    assert all(torch.equal(state[name], value) for name, value in values.items())


def test_the_digest_is_not_for_meta(saved):
    path, model = saved
    with pytest.raises(ValueError, match=r"meta must leave 'fastlip\.sha256'"):
        models.save_checkpoint(path, model, {"fastlip.sha256": "0"})
