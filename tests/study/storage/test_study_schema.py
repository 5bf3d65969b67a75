"""Every file of a run has a schema, which it satisfies."""

import csv
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fastlip.models import load_checkpoint
from fastlip.study.measure.spectra import CONDITIONS
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stages import stages
from fastlip.study.report.long_csv import LONG, TEXT
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.storage.files import read_arrays, read_json
from fastlip.study.storage.schema import Lipschitz, Power, Results

N, SNAPSHOT, CLEAN = 18, 12, 24  # images of the micro run
PIXELS = (3, 32, 32)

#: Per-image arrays: dtype kind and shape after the number of images; ... stands for the depth points of the model.
DECIDED = {"id": "i", "label": "i", "prediction": "i"}
MOVED = DECIDED | dict.fromkeys(("l2", "linf", "l1", "distortion", "stretch"), "f") | {"depth_stretch": ("f", (...,))}
SMALLEST = MOVED | {"found": "b", "ceiling": "f", "image": ("f", PIXELS)}
CLEAN_ARRAYS = DECIDED | {"margin": "f", "image": ("u", PIXELS)}
MEASUREMENTS = {
    r"clean(-attacked)?": CLEAN_ARRAYS,
    r"gaussian-0\.1|gaussian-of-same-norm": MOVED,
    r"pgd-(linf-[18]|l2-0\.5)": MOVED | {"noise_prediction": "i"},
    r"strong-linf-8": MOVED | {f"stands/{a}": "b" for a in ("APGD, cross-entropy", "APGD, targeted", "Square")},
    r"smallest-(pgd|gaussian)": SMALLEST,
    r"jacobian": {"id": "i", "norm": "f"},
    r"smoothing": DECIDED | {"count": "i", "radius": "f"},
    r"transfer-images": {"id": "i", "label": "i", "perturbed": ("f", (1, *PIXELS)), "l2": ("f", (1,))},
}
IMAGES = {"clean": CLEAN, "jacobian": 3, "smoothing": 3, "transfer-images": 12}


@pytest.fixture(scope="module")
def files(finished):
    """Every file of the run by its path within it; hidden ones are locks."""
    found = {p.relative_to(finished.path).as_posix(): p for p in finished.path.rglob("*") if p.is_file()}
    return {name: path for name, path in found.items() if not name.startswith(".")}


def matching(files, pattern):
    found = {name: path for name, path in files.items() if re.fullmatch(pattern, name)}
    assert found, pattern
    return found


def test_no_file_is_unknown(files):
    known = (
        r"(config|results|timings)\.json|report\.html|checkpoints/[a-z0-9-]+\.safetensors|(training|lipschitz)/.*\.json"
        r"|images/[a-z0-9-]+/[a-z0-9.-]+\.npz|spectra/[a-z0-9-]+/(weights|features)\.npz"
        r"|tables/[a-z]+\.(md|tex|csv)|figures/[a-z0-9-]+\.(svg|csv)"
    )
    assert [name for name in files if not re.fullmatch(known, name)] == []


@pytest.mark.parametrize("pattern", MEASUREMENTS)
def test_arrays_of_images(files, pattern):
    points = {m["name"]: len(m["depth_points"]) for m in read_json(files["results.json"])["models"]}
    for name, path in matching(files, rf"images/[a-z0-9-]+/({pattern})\.npz").items():
        model = name.split("/")[1]
        n = SNAPSHOT if model.endswith("-e1") else IMAGES.get(path.stem, N)
        depth = points[model.removesuffix("-e1")]
        arrays, expected = read_arrays(path), MEASUREMENTS[pattern]
        if not depth:
            expected = {key: form for key, form in expected.items() if key != "depth_stretch"}
        assert set(arrays) == set(expected), name
        for key, form in expected.items():
            kind, shape = (form, ()) if isinstance(form, str) else form
            shape = tuple(depth if size is ... else size for size in shape)
            assert arrays[key].dtype.kind == kind, (name, key)
            assert arrays[key].shape == (n, *shape), (name, key)
        assert arrays["id"].tolist() == list(range(n))


def test_every_measurement_has_a_schema(files):
    patterns = "|".join([*MEASUREMENTS, "corruptions", "transfer"])
    names = {path.stem for path in matching(files, r"images/.*\.npz").values()}
    assert [name for name in names if not re.fullmatch(patterns, name)] == []


def test_arrays_of_corruptions(files):
    for path in matching(files, r"images/[a-z0-9-]+/corruptions\.npz").values():
        arrays = read_arrays(path)
        measured = {"prediction": "i", "distortion": "f", "stretch": "f"}
        assert set(arrays) == {"corruption", "severity", "label", "clean_prediction", *measured}
        for key, kind in measured.items():
            assert arrays[key].dtype.kind == kind
            assert arrays[key].shape == (len(arrays["corruption"]), 1, 12)
        assert arrays["severity"].tolist() == [5]
        assert (arrays["distortion"] > 0).all()
        assert np.isfinite(arrays["stretch"]).all()


def test_arrays_of_transfer(files, finished):
    for path in matching(files, r"images/[a-z0-9-]+/transfer\.npz").values():
        arrays = read_arrays(path)
        assert set(arrays) == {"source", "strength", "label", "prediction", "noise_prediction"}
        assert arrays["source"].tolist() == [model.name for model in finished.models]
        assert arrays["strength"].tolist() == [1.0]
        for name in ("prediction", "noise_prediction"):
            assert arrays[name].dtype.kind == "i"
            assert arrays[name].shape == (3, 1, 12)


def test_arrays_of_spectra(files):
    for path in matching(files, r"spectra/[a-z0-9-]+/weights\.npz").values():
        arrays = read_arrays(path)
        assert set(arrays) == {"layer", "distance", *arrays["layer"].tolist()}
        for layer in arrays["layer"].tolist():
            assert (np.diff(arrays[layer]) <= 0).all()
    for path in matching(files, r"spectra/[a-z0-9-]+/features\.npz").values():
        arrays = read_arrays(path)
        found = arrays["stage"].tolist()
        values = {f"{c}/{stage}" for c in CONDITIONS for stage in found}
        assert set(arrays) == {"stage", *values, *(f"growth/{c}" for c in CONDITIONS[1:])}
        assert arrays["growth/pgd"].shape == (12, len(found))


def test_json(files, finished, micro, conforms):
    conforms(read_json(files["results.json"]), Results)
    for path in matching(files, r"lipschitz/.*\.json").values():
        conforms(read_json(path), Lipschitz)
    for path in matching(files, r"training/.*\.json").values():
        training = read_json(path)
        assert set(training) == {"images", "data", "classes", "epochs", "processes", "loss", "accuracy"}
        assert len(training["loss"]) == len(training["accuracy"]) == training["epochs"]
    config = read_json(files["config.json"])
    assert set(config) == {
        *("settings", "rules", "power", "machine", "inputs", "seeds", "command", "versions", "build")
    }
    for row in config["power"]:
        conforms(row, Power)
    timings = read_json(files["timings.json"])
    assert set(timings) == {stage.name for stage in stages(finished, Inputs(micro, InputPaths()))}
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in timings.values())


def test_checkpoints_say_what_they_were_trained_on(files):
    for path in matching(files, r"checkpoints/.*\.safetensors").values():
        tensors, meta = load_checkpoint(path)
        assert tensors["network.fc.weight"].shape[0] == int(meta["classes"])
        assert "generated" in meta["images"]


def test_tables_and_figures(files):
    for path in matching(files, r"(tables|figures)/.*\.csv").values():
        header, *rows = csv.reader(path.read_text().splitlines())
        assert rows
        assert all(len(row) == len(header) for row in rows), path.name
    rows = list(csv.DictReader(files["tables/results.csv"].read_text().splitlines()))
    assert tuple(rows[0]) == LONG
    for row in rows:
        assert row["part"]
        assert row["measure"]
        if row["part"] in ("models", "points"):
            assert row["model"]
            assert row["arm"]
            assert row["seed"] == "0"
        for name in set(LONG) - set(TEXT):
            assert row[name] == "" or np.isfinite(float(row[name]))
    stems = {path.stem for path in matching(files, r"tables/.*\.csv").values()} - {"results"}
    for kind in ("md", "tex"):
        assert {path.stem for path in matching(files, rf"tables/.*\.{kind}").values()} == stems
    for path in matching(files, r"figures/.*\.svg").values():
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
