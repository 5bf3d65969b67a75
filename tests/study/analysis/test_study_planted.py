"""Synthetic runs, from per-image files to verdicts: a planted difference is found, and none is found without one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from fastlip.study.analysis import results
from fastlip.study.analysis.summaries import gaussian_of_same_norm
from fastlip.study.measure.spectra import CONDITIONS
from fastlip.study.pipeline import start_or_resume
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.attacks import PgdSettings, StrongSuiteSettings
from fastlip.study.settings.measurements import GENERATED_CORRUPTIONS, CorruptionSettings
from fastlip.study.settings.rules import Rules
from fastlip.study.settings.settings import Settings
from fastlip.study.storage.files import write_arrays, write_json
from fastlip.study.storage.run_directory import gaussian_name, pgd_name

IMAGES = 80


@pytest.fixture(scope="module")
def settings() -> Settings:
    demo = overrides.override(
        presets.preset("demo"),
        [
            "seeds=6",
            "architecture=resnet18",
            "evaluation.images=80",
            "evaluation.clean_images=80",
            "evaluation.snapshot_images=80",
            "gaussian.sigmas=0.1",
            "scratch.snapshots=1",
            "finetune.snapshots=1",
            "rules.resamples=100",
            "device=cpu",
        ],
    )
    return dataclasses.replace(
        demo,
        pgd=PgdSettings(linf_255=(1.0,), l2=(0.5,), l1=()),
        strong=StrongSuiteSettings(linf_255=(), l2=()),
        corruptions=CorruptionSettings(severities=(5,), images=80),
    )


def plant(folder, settings, difference):
    """Files of a run whose fine-tuned arm has smallest distortions and accuracies raised by ``difference``."""
    run = start_or_resume.open_or_create(folder / "run", settings, {"target": "planted"}, "planted")
    rng = np.random.default_rng(0)
    for model in [*run.models, *run.snapshots]:
        shift = difference if model.arm == "finetune" else 0.0
        level = 0.01 * (1 + shift) * np.exp(0.02 * rng.normal())
        label = np.arange(IMAGES) % 6
        wrong = (label + 1) % 6
        decided = {"id": np.arange(IMAGES), "label": label}

        def moved(distortion, right, decided=decided, label=label, wrong=wrong):
            return decided | {
                "prediction": np.where(right, label, wrong),
                "noise_prediction": label,
                "distortion": distortion,
                "stretch": 10 + rng.normal(size=IMAGES),
                "depth_stretch": np.ones((IMAGES, 9)),
                "l2": distortion,
                "found": np.isfinite(distortion),
            }

        clean = decided | {"prediction": label, "margin": np.ones(IMAGES)}
        smallest = level * np.exp(0.3 * rng.normal(size=IMAGES))
        small = np.full(IMAGES, 0.001)
        written = {
            "clean-attacked": clean,
            "smallest-pgd": moved(smallest, np.zeros(IMAGES, dtype=bool)),
            "clean": clean,
            gaussian_name(0.1): moved(small, np.ones(IMAGES, dtype=bool)),
            pgd_name("linf", 1.0): moved(small, rng.uniform(size=IMAGES) < 0.4 + shift),
            pgd_name("l2", 0.5): moved(small, rng.uniform(size=IMAGES) < 0.2),
            "smallest-gaussian": moved(30 * smallest, np.zeros(IMAGES, dtype=bool)),
            "gaussian-of-same-norm": moved(smallest, np.ones(IMAGES, dtype=bool)),
            "jacobian": {"id": np.arange(4), "norm": np.ones(4)},
            "smoothing": decided | {"prediction": label, "count": label, "radius": np.full(IMAGES, 0.1)},
            "corruptions": {
                "corruption": np.array(GENERATED_CORRUPTIONS),
                "severity": np.array([5]),
                "label": label,
                "prediction": np.broadcast_to(label, (len(GENERATED_CORRUPTIONS), 1, IMAGES)),
            },
        }
        for name, arrays in list(written.items())[: 2 if model.epoch is not None else None]:
            write_arrays(run.images(model.name, name), arrays)
        bound = {"log10_upper": 20 + rng.normal(), "log10_margin": 20.0, "confidence": 1.0, "log10_layer_product": 19.0}
        write_json(run.lipschitz(model.name), bound | {"layers": []})
        training = {"images": 9, "data": "planted", "classes": list("abcdef"), "epochs": 1, "processes": 1}
        write_json(run.training(model.name), training | {"loss": [1.0], "accuracy": [0.5]})
        write_arrays(
            run.spectra(model.name, "weights"),
            {"layer": np.array(["a"]), "distance": np.array([0.1]), "a": np.array([2.0, 1.0])},
        )
        features = {f"{c}/stem": np.array([2.0, 1.0]) for c in CONDITIONS}
        growth = {f"growth/{c}": np.ones((IMAGES, 1)) for c in CONDITIONS[1:]}
        write_arrays(run.spectra(model.name, "features"), {"stage": np.array(["stem"])} | features | growth)
    return results.analyse(run, "planted")


@pytest.mark.parametrize(
    ("difference", "expected"), [(0.3, "supported"), (-0.3, "contradicted"), (0.0, "undetermined")]
)
def test_a_planted_difference_is_found_and_a_missing_one_is_not(tmp_path, settings, difference, expected):
    results = plant(tmp_path, settings, difference)
    assert [v["verdict"] for v in results["verdicts"]][:3] == ["supported", "supported", expected]
    # The constants were drawn without regard to the distortions.
    assert results["verdicts"][3]["verdict"] == "undetermined"
    assert len(results["points"]) == 6 * (2 + 2)
    medians = [c for c in results["comparisons"] if c["measure"] == "median smallest distortion"]
    assert len(medians) == 6
    if difference:
        assert all(np.sign(c["difference"]["value"]) == np.sign(difference) for c in medians)
    had = {row["question"]: row["had"] for row in results["power"]}
    assert had == {1: IMAGES, 2: IMAGES, 3: 6, 4: 6}


def test_noise_counts_where_there_is_a_smallest_perturbation_to_be_as_long_as():
    label = np.zeros(4, dtype=int)
    arrays = {
        "smallest-pgd": {"found": np.array([True, True, False, True])},
        # The third image was given noise of length 0, and the fourth was wrong to begin with.
        "gaussian-of-same-norm": {"label": label, "prediction": np.array([0, 1, 0, 0])},
    }
    stored = SimpleNamespace(
        right=np.array([True, True, True, False]),
        rules=Rules(),
        images=arrays.__getitem__,
        decided=lambda name: arrays[name]["prediction"] == arrays[name]["label"],
    )
    found = gaussian_of_same_norm(stored)
    assert (found["k"], found["n"]) == (1, 2)
