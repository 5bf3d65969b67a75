"""Which layers each transfer method trains, and which it keeps from the source."""

import pytest
import torch

from fastlip.models import load_checkpoint
from fastlip.study.pipeline import start_or_resume
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stages import stages
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.settings.training import ARMS


@pytest.fixture(scope="module")
def weights(micro, tmp_path_factory):
    """Checkpoints of all arms by name."""
    settings = overrides.override(micro, ["arms=" + ",".join(ARMS)])
    inputs = Inputs(settings, InputPaths())
    run = start_or_resume.open_or_create(
        tmp_path_factory.mktemp("arms") / "run", settings, inputs.fingerprints(), "test"
    )
    for stage in stages(run, inputs):
        if "training" in stage.name:
            stage.run(lambda done, total, note: None)
            assert stage.done
    return {path.stem: load_checkpoint(path)[0] for path in run.path.glob("checkpoints/*.safetensors")}


def changed(one, other):
    """Children of the network of which any tensor differs."""
    return {k.split(".")[1] for k in one if "fc" not in k and not torch.equal(one[k], other[k])}


def test_every_arm_is_trained(weights):
    assert set(weights) == {"source", "lpft-s0-head", "scratch-s0-e1", *(f"{arm}-s0" for arm in ARMS)}


@pytest.mark.parametrize("name", ["linear-s0", "lpft-s0-head"])
def test_the_probe_leaves_the_body_and_its_statistics_as_the_source_has_them(weights, name):
    assert changed(weights[name], weights["source"]) == set()


def test_partial_trains_the_last_stage_alone(weights):
    assert changed(weights["partial-s0"], weights["source"]) == {"layer4"}


@pytest.mark.parametrize("name", ["finetune-s0", "lpft-s0", "scratch-s0"])
def test_the_others_train_every_stage(weights, name):
    assert changed(weights[name], weights["source"]) >= {"conv1", "layer1", "layer4"}


def test_a_snapshot_is_on_the_way(weights):
    head = "network.fc.weight"
    assert not torch.equal(weights["scratch-s0-e1"][head], weights["scratch-s0"][head])


def test_lpft_goes_on_from_its_own_probe(weights):
    head = "network.fc.weight"
    steps = [(weights["lpft-s0"][head] - weights[name][head]).norm() for name in ("lpft-s0-head", "finetune-s0")]
    assert not torch.equal(weights["lpft-s0"][head], weights["lpft-s0-head"][head])
    assert all(step > 0 for step in steps)


def test_full_has_all_arms_and_three_seeds():
    full = presets.preset("full")
    assert set(full.arms) == set(ARMS)
    assert full.seeds >= 3
