"""Example images with their smallest perturbations, which are magnified for display."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastlip._text import printable
from fastlip.study.report.arms import title
from fastlip.study.storage.array_files import read_measured
from fastlip.study.storage.files import damaged
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Model, Results

#: Largest side at which images are shown, in pixels; larger ones are reduced.
_SIDE = 96


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
    """One test image that a model classifies correctly, and perturbed versions that it does not.

    Attributes:
        number: of the image among those shown, from 0.
        model: title of the model.
        label: the image's class.
        clean: the image, a data URI.
        shown: the perturbed versions.
    """

    number: int
    model: str
    label: str
    clean: str
    shown: tuple[PerturbedImage, ...]


def examples(run: RunDirectory, results: Results) -> list[Example]:
    """The first images, of different classes where possible, that all models of the first seed classify correctly.

    They are ordered by image, and then by model, the small references last.
    """
    classes = [printable(name) for name in results["classes"]]
    first = [m for m in results["models"] if m["seed"] == results["models"][0]["seed"]]
    models = sorted(first, key=lambda m: m["role"] == "reference")
    clean = [_of_classes(run.images(m["name"], "clean-attacked"), len(classes)) for m in models]
    n = len(clean[0]["label"])
    stored = [
        {kind: _of_classes(run.images(m["name"], f"smallest-{kind}"), len(classes), n) for kind in ("pgd", "gaussian")}
        for m in models
    ]
    usable = np.ones(len(clean[0]["image"]), dtype=bool)
    for decided, kinds in zip(clean, stored, strict=True):
        usable &= (decided["prediction"] == decided["label"])[: len(usable)]
        for arrays in kinds.values():
            usable &= arrays["found"][: len(usable)]
    rows = _one_per_class(np.flatnonzero(usable), clean[0]["label"], run.settings.examples)
    return [
        _example(number, row, *about, classes)
        for number, row in enumerate(rows)
        for about in zip(models, clean, stored, strict=True)
    ]


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
    number: int,
    row: int,
    model: Model,
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
                image=data_uri(arrays["image"][row]),
                perturbation=data_uri(0.5 + gain * difference),
                gain=gain,
                distortion=float(arrays["distortion"][row]),
                decision=classes[int(arrays["prediction"][row])],
            )
        )
    return Example(number, title(model), classes[int(clean["label"][row])], data_uri(original), tuple(shown))


def data_uri(image: np.ndarray) -> str:
    """An image [3, H, W] in [0, 1] as a PNG data URI, reduced where it is large."""
    pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    out = io.BytesIO()
    picture = Image.fromarray(pixels)
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE))
    picture.save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
