"""Which layers each transfer method trains, and which it keeps from the source."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastlip import layer_norms, lipschitz_bound
from fastlip.models import load_checkpoint
from fastlip.study.errors import StudyError
from fastlip.study.pipeline import start_or_resume
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.networks import Networks
from fastlip.study.pipeline.stages import stages
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths, resolve_source
from fastlip.study.settings.training import ARMS
from fastlip.study.storage.run_directory import TrainedModel
from fastlip.study.training.architectures import build
from fastlip.study.training.unfinished import RESUMING


@pytest.fixture(scope="module")
def checkpoints(micro, tmp_path_factory):
    """Checkpoints of all arms by name, with what they say about themselves."""
    settings = overrides.override(micro, ["arms=" + ",".join(ARMS)])
    inputs = Inputs(settings, InputPaths())
    run = start_or_resume.open_or_create(
        tmp_path_factory.mktemp("arms") / "run", settings, inputs.fingerprints(), "test"
    )
    for stage in stages(run, inputs):
        if "training" in stage.name:
            stage.run(lambda done, total, note: None)
            assert stage.done
    return {path.stem: load_checkpoint(path) for path in run.path.glob("checkpoints/*.safetensors")}


@pytest.fixture(scope="module")
def weights(checkpoints):
    return {name: state for name, (state, _) in checkpoints.items()}


def test_every_checkpoint_says_of_which_network_it_is(checkpoints, micro):
    own = {"model": micro.model, "stem": micro.stem, "scale": str(micro.scale)}
    for name, (_, said) in checkpoints.items():
        arm = name.partition("-")[0]
        small = {"model": f"fastlip:{arm}", "stem": "imagenet", "scale": "1"}
        expected = small if arm in ("softmax", "mlp", "convnet") else own
        if arm == "resnet18":
            expected = own | {"model": "torchvision:resnet18"}
        assert said.items() >= expected.items(), name


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


@pytest.mark.parametrize("name", ["finetune-s0", "lpft-s0", "scratch-s0", "constrained-s0"])
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


def test_constrained_keeps_all_norms_below_its_bound_and_the_constant_below_that_of_scratch(micro, checkpoints):
    shape, found = (3, micro.image_size, micro.image_size), {}
    for arm in ("scratch", "constrained"):
        network = build(micro, arm, 6, 0)
        network.load_state_dict(checkpoints[f"{arm}-s0"][0])  # a plain one, under the names of any other arm
        norms = layer_norms(network.eval(), shape)
        uppers = [interval.upper for name, interval in norms.items() if not name.startswith("normalize.")]
        found[arm] = max(uppers), lipschitz_bound(network, shape).log10_upper
    bound = micro.norm_bound("constrained", 0)
    assert found["constrained"][0] <= 1.01 * bound < found["scratch"][0]
    assert found["constrained"][1] < found["scratch"][1] - 1


def test_constrained_training_goes_on_where_it_was_interrupted(micro, checkpoints, tmp_path):
    settings = overrides.override(micro, ["arms=constrained"])
    inputs = Inputs(settings, InputPaths())
    run = start_or_resume.open_or_create(tmp_path / "run", settings, inputs.fingerprints(), "test")

    def stop(done, total, note):
        if done == 2 and note != RESUMING:
            raise KeyboardInterrupt

    told = []
    for progress in (stop, lambda done, total, note: told.append(note)):
        (stage,) = (s for s in stages(run, inputs) if s.name == "constrained-s0: training")
        if progress is stop:
            with pytest.raises(KeyboardInterrupt):
                stage.run(progress)
            assert not stage.done
        else:
            stage.run(progress)
    assert told[0] == RESUMING
    again = load_checkpoint(run.checkpoint("constrained-s0"))[0]
    for name, value in checkpoints["constrained-s0"][0].items():
        assert torch.equal(again[name], value), name


def test_full_has_all_arms_that_its_data_and_its_source_allow_and_three_seeds():
    full = presets.preset("full")
    # It takes all images, and what a published source cost is not known.
    assert set(full.arms) == set(ARMS) - {"disjoint", "matched"}
    assert full.seeds >= 3


def test_disjoint_is_trained_on_images_that_no_other_arm_sees(micro):
    inputs = Inputs(micro, InputPaths())
    seen = {arm: {image.numpy().tobytes() for image in inputs.target_train(arm).images} for arm in ARMS}
    assert all(len(images) == 48 for images in seen.values())
    for arm in ARMS:
        assert seen[arm] == seen["disjoint" if arm == "disjoint" else "scratch"]
    assert not seen["disjoint"] & seen["scratch"]
    counts = torch.bincount(inputs.target_train("disjoint").labels)
    assert counts.max() - counts.min() <= 1


def test_disjoint_is_refused_where_the_data_do_not_hold_twice_as_many_images(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(2, 24, 32, 32, 3), dtype=np.uint8)
    for c, images in enumerate(pixels):
        (tmp_path / f"class{c}").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"class{c}" / f"{i}.png")
    small = ["evaluation.images=4", "evaluation.clean_images=4", "reference.images=16"]
    paths = InputPaths(target=tmp_path)
    for images, enough in ((16, True), (24, False)):
        settings = overrides.override(
            presets.preset("quick"), ["examples=1", *small, "arms=scratch,disjoint", f"scratch.images={images}"]
        )
        inputs = Inputs(resolve_source(settings, paths), paths)
        if enough:
            inputs.require_available()
            found = [inputs.target_train(arm).images for arm in ("scratch", "disjoint")]
            assert len({image.numpy().tobytes() for part in found for image in part}) == 2 * images
            continue
        with pytest.raises(StudyError, match="disjoint has 24 training images that scratch has not") as caught:
            inputs.require_available()
        assert caught.value.status == 2
        assert "\n" not in str(caught.value)


def test_matched_sees_as_many_images_as_the_source_and_the_fine_tuning(micro):
    settings = overrides.override(micro, ["pretrain.images=96", "pretrain.epochs=3", "finetune.epochs=4"])
    matched = settings.schedule("matched")
    assert matched.images * matched.epochs == 3 * 96 + 4 * 48
    assert matched.images == settings.scratch.images
    assert matched.snapshots == ()


@pytest.mark.parametrize(
    ("setting", "message"), [("arms=scratch,matched", "matched sees as many"), ("sources=each", "sources=each")]
)
def test_what_needs_a_source_that_the_run_trains_is_refused_without_one(micro, setting, message):
    settings = overrides.override(micro, ["arms=scratch", setting])
    with pytest.raises(StudyError, match=message) as caught:
        Inputs(settings, InputPaths()).require_available()
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)


def test_each_seed_has_a_source_of_its_own(micro, tmp_path):
    settings = overrides.override(micro, ["arms=scratch,finetune,linear", "seeds=2", "sources=each"])
    inputs = Inputs(settings, InputPaths())
    run = start_or_resume.open_or_create(tmp_path / "run", settings, inputs.fingerprints(), "test")
    found = {stage.name: stage for stage in stages(run, inputs)}
    for seed in (0, 1):
        found[f"source-s{seed}: pre-training"].run(lambda done, total, note: None)
        for arm in ("finetune", "linear"):
            assert run.checkpoint(f"source-s{seed}") in found[f"{arm}-s{seed}: training"].needs
            assert run.checkpoint(f"source-s{seed}") in found[f"{arm}-s{seed}: weight spectra"].needs
            assert run.checkpoint(f"source-s{1 - seed}") not in found[f"{arm}-s{seed}: training"].needs
        assert not any("source" in path.name for path in found[f"scratch-s{seed}: training"].needs)
    assert run.training("source-s1").exists()
    sources = [load_checkpoint(run.checkpoint(f"source-s{seed}"))[0] for seed in (0, 1)]
    assert changed(*sources) >= {"conv1", "layer1", "layer4"}
    networks = Networks(run, inputs, torch.device("cpu"))
    for seed, source in enumerate(sources):
        start = networks.untrained(TrainedModel("finetune", seed), 6).state_dict()
        assert changed(start, source) == set()
