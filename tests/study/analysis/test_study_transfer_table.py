"""The cross table of transfer from planted decisions, and which pairs of arms share no training image."""

import dataclasses

import numpy as np
import pytest

from fastlip.study.analysis.transfer_table import trained_on_disjoint_images, transfer_table
from fastlip.study.errors import StudyError
from fastlip.study.pipeline import start_or_resume
from fastlip.study.settings import overrides
from fastlip.study.settings.training import ARMS, REFERENCES, TRANSFER
from fastlip.study.storage.files import read_arrays, write_arrays

LABEL = np.arange(8) % 2
SMALL = ["arms=softmax,scratch,disjoint", "seeds=2", "transfer.images=6", "transfer.l2=0.5,1"]


def wrong_at(*rows, n=8):
    """Decisions that are wrong at these rows."""
    return np.where(np.isin(np.arange(n), rows), 1 - LABEL[:n], LABEL[:n])


@pytest.fixture
def run(micro, tmp_path):
    settings = overrides.override(micro, SMALL)
    found = start_or_resume.open_or_create(tmp_path / "run", settings, {"target": "planted"}, "planted")
    clean = {"softmax": wrong_at(0), "scratch": wrong_at(1, 7), "disjoint": wrong_at()}
    for model in found.models:
        arrays = {"label": LABEL, "prediction": clean[model.arm], "margin": np.ones(8)}
        write_arrays(found.images(model.name, "clean-attacked"), arrays)
        # The first source fools everywhere, the second at one image under the larger norm, the third nowhere.
        fooled = np.stack(
            [
                np.stack([wrong_at(*range(6), n=6)] * 2),
                np.stack([wrong_at(n=6), wrong_at(2, n=6)]),
                np.stack([wrong_at(n=6)] * 2),
            ]
        )
        arrays = {
            "source": np.array([f"{arm}-s{model.seed}" for arm in ("softmax", "scratch", "disjoint")]),
            "strength": np.array([0.5, 1.0]),
            "label": LABEL[:6],
            "prediction": fooled,
            "noise_prediction": np.broadcast_to(wrong_at(5, n=6), (3, 2, 6)),
        }
        write_arrays(found.images(model.name, "transfer"), arrays)
    return found


def test_all_pairs_of_a_seed_at_all_norms(run):
    found = transfer_table(run)
    names = ["softmax", "scratch", "disjoint"]
    expected = {(f"{a}-s{s}", f"{b}-s{s}", v) for s in (0, 1) for a in names for b in names for v in (0.5, 1.0)}
    assert len(found) == len(expected)
    assert {(t["source"], t["target"], t["strength"]) for t in found} == expected


def test_shares_are_over_images_that_both_classify_correctly(run):
    found = {(t["source"], t["target"], t["strength"]): t for t in transfer_table(run)}
    cases = {
        ("softmax-s0", "disjoint-s0"): (5, 5, 5),
        ("scratch-s0", "softmax-s0"): (0, 1, 4),
        ("scratch-s0", "scratch-s0"): (0, 1, 5),
        ("disjoint-s1", "disjoint-s1"): (0, 0, 6),
    }
    for pair, (weak, strong, n) in cases.items():
        for norm, fooled in ((0.5, weak), (1.0, strong)):
            row = found[(*pair, norm)]
            assert (row["fooled"]["k"], row["fooled"]["n"]) == (fooled, n)
            assert (row["noise"]["k"], row["noise"]["n"]) == (1, n)


def test_pairs_with_the_disjoint_arm_are_marked(run):
    for row in transfer_table(run):
        arms = {row["source"].partition("-")[0], row["target"].partition("-")[0]}
        assert row["disjoint"] == (len(arms) == 2 and "disjoint" in arms)


@pytest.mark.parametrize(
    "change",
    [
        {"source": np.array(["softmax-s0", "scratch-s0", "finetune-s0"])},
        {"strength": np.array([0.5, 2.0])},
        {name: None for name in ("label", "prediction", "noise_prediction")},
    ],
)
def test_a_file_of_another_run_is_refused(run, change):
    path = run.images("scratch-s0", "transfer")
    arrays = read_arrays(path)
    changed = {name: arrays[name][..., :5] if value is None else value for name, value in change.items()}
    write_arrays(path, arrays | changed)
    with pytest.raises(StudyError, match=r"transfer\.npz is damaged \(its .* not th.* of this run"):
        transfer_table(run)


def test_nothing_is_read_where_nothing_was_measured(micro, tmp_path):
    settings = overrides.override(micro, ["transfer.l2="])
    run = start_or_resume.open_or_create(tmp_path / "run", settings, {"target": "planted"}, "planted")
    assert transfer_table(run) == []


def test_only_what_is_known_to_be_disjoint_is_called_so(micro):
    for a in ARMS:
        for b in ARMS:
            found = trained_on_disjoint_images(micro, a, b)
            assert found == trained_on_disjoint_images(micro, b, a)
            assert found == ((a == "disjoint") != (b == "disjoint"))
    more = overrides.override(micro, ["finetune.images=96", "reference.images=96"])
    for arm in (*REFERENCES, *TRANSFER):  # which now see images of the disjoint arm, too
        assert not trained_on_disjoint_images(more, "disjoint", arm)
    assert trained_on_disjoint_images(more, "disjoint", "scratch")


def test_a_source_that_may_have_seen_the_images_is_not_called_disjoint(micro):
    for source, known in (("imagenet", False), ("cifar100", True), ("checkpoint", False), ("folder", False)):
        settings = dataclasses.replace(micro, dataset="cifar10", source=source)
        assert trained_on_disjoint_images(settings, "disjoint", "finetune") == known
        assert not trained_on_disjoint_images(settings, "finetune", "linear")
        other = dataclasses.replace(settings, dataset="folder")  # which may hold images of the source
        assert not trained_on_disjoint_images(other, "disjoint", "finetune")
    settings = dataclasses.replace(micro, arms=(), checkpoints=("a", "b"))
    assert not trained_on_disjoint_images(settings, "a", "b")
