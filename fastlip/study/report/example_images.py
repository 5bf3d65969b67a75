"""Example images with their smallest perturbations, which are magnified for display."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastlip.study.storage.array_files import read_measured
from fastlip.study.storage.files import damaged
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel


@dataclass(frozen=True)
class PerturbedImage:
    """One perturbed version of an image.

    Attributes:
        kind: "PGD" or "Gaussian".
        image: the perturbed image, a data URI.
        perturbation: its difference from the clean image around mid-grey, a data URI.
        gain: the factor by which the difference is magnified.
        distortion: in [0, 1].
        decision: the class that the model decides for.
    """

    kind: str
    image: str
    perturbation: str
    gain: float
    distortion: float
    decision: str


@dataclass(frozen=True)
class Example:
    """One test image that the model classifies correctly, and perturbed versions that it does not."""

    model: str
    label: str
    clean: str
    shown: tuple[PerturbedImage, ...]


def examples(run: RunDirectory, classes: list[str]) -> list[Example]:
    """The first images, of different classes where possible, that all models of the first seed classify correctly."""
    models = [m for m in run.models if m.seed == run.settings.seed]
    clean = {m: _of_classes(run.images(m.name, "clean-attacked"), len(classes)) for m in models}
    n = len(clean[models[0]]["label"])
    stored = {
        m: {kind: _of_classes(run.images(m.name, f"smallest-{kind}"), len(classes), n) for kind in ("pgd", "gaussian")}
        for m in models
    }
    usable = np.ones(len(clean[models[0]]["image"]), dtype=bool)
    for m in models:
        usable &= (clean[m]["prediction"] == clean[m]["label"])[: len(usable)]
        for arrays in stored[m].values():
            usable &= arrays["found"][: len(usable)]
    rows = _one_per_class(np.flatnonzero(usable), clean[models[0]]["label"], run.settings.examples)
    return [_example(m, row, clean[m], stored[m], classes) for row in rows for m in models]


def _of_classes(path: Path, classes: int, n: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of one measurement, whose labels and predictions are checked to lie below ``classes``."""
    arrays = read_measured(path, n, "image")
    decided = np.concatenate([arrays["label"], arrays["prediction"]])
    if not ((decided >= 0) & (decided < classes)).all():
        raise damaged(path, f"it speaks of a class that is not among the {classes} of results.json")
    return arrays


def _one_per_class(rows: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """``count`` of ``rows``, which take turns among the classes."""
    turn: dict[int, int] = {}
    order = []
    for row in rows.tolist():
        label = int(labels[row])
        turn[label] = turn.get(label, 0) + 1
        order.append((turn[label], row))
    return [row for _, row in sorted(order)[:count]]


def _example(
    model: TrainedModel,
    row: int,
    clean: dict[str, np.ndarray],
    stored: dict[str, dict[str, np.ndarray]],
    classes: list[str],
) -> Example:
    original = clean["image"][row].astype(np.float32) / 255
    shown = []
    for kind, name in (("pgd", "PGD"), ("gaussian", "Gaussian")):
        arrays = stored[kind]
        difference = arrays["image"][row] - original
        gain = 0.5 / max(float(np.abs(difference).max()), 1e-12)
        shown.append(
            PerturbedImage(
                kind=name,
                image=_uri(arrays["image"][row]),
                perturbation=_uri(0.5 + gain * difference),
                gain=gain,
                distortion=float(arrays["distortion"][row]),
                decision=classes[int(arrays["prediction"][row])],
            )
        )
    return Example(model.name, classes[int(clean["label"][row])], _uri(original), tuple(shown))


def _uri(image: np.ndarray) -> str:
    """[3, H, W] in [0, 1] as a PNG data URI."""
    pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
