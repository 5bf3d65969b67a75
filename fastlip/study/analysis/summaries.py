"""Summaries of the measurements of one model: the parts of its entry in results.json."""

from typing import Any

import numpy as np

from fastlip.study.analysis.statistics import mean, median, proportion
from fastlip.study.measure import spectra
from fastlip.study.storage.array_files import read_corruptions, read_measured, read_spectra
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel, gaussian_name, pgd_name, strong_name
from fastlip.study.storage.schema import (
    AttackSummary,
    CertifiedAt,
    Corruption,
    Corruptions,
    DepthStretch,
    FeatureSpectrum,
    Growth,
    Jacobian,
    Lipschitz,
    Margins,
    Member,
    Proportion,
    Smallest,
    Smoothed,
    Stretch,
    Strong,
    Training,
    TrainingRecord,
    WeightSpectrum,
)


class StoredModel:
    """The stored measurements of one model."""

    def __init__(self, run: RunDirectory, trained: TrainedModel) -> None:
        self.run = run
        self.trained = trained
        self.rules = run.settings.rules
        #: Whether the model classifies each attacked image correctly without the attack, [N] bool.
        self.right = self.decided("clean-attacked")

    def images(self, measurement: str) -> dict[str, np.ndarray]:
        """The per-image arrays of a measurement."""
        # Only the attacks have as many images as clean-attacked.
        n = None if measurement in ("clean-attacked", "clean", "jacobian", "smoothing") else len(self.right)
        return read_measured(self.run.images(self.trained.name, measurement), n)

    def decided(self, measurement: str) -> np.ndarray:
        """Whether each image is classified correctly under a measurement, [N] bool."""
        arrays = self.images(measurement)
        found: np.ndarray = arrays["prediction"] == arrays["label"]
        return found


def training(stored: StoredModel) -> Training | None:
    """How the model was trained; None for a checkpoint."""
    if stored.run.settings.role_of(stored.trained.arm) == "checkpoint":
        return None
    record = read(stored.run.training(stored.trained.name), TrainingRecord)
    return Training(
        images=record["images"],
        epochs=record["epochs"],
        processes=record["processes"],
        loss=record["loss"],
        accuracy=record["accuracy"],
    )


def attacks(stored: StoredModel) -> list[AttackSummary]:
    """All attacks at fixed strengths, noise first."""
    s = stored.run.settings
    found = [_attack(stored, gaussian_name(v), "gaussian", None, v) for v in s.gaussian.sigmas]
    return found + [_attack(stored, pgd_name(norm, v), "pgd", norm, eps) for norm, v, eps in s.pgd.grid]


def perturbing_measurements(run: RunDirectory) -> list[str]:
    """The names of all measurements that perturb images and observe their stretch."""
    s = run.settings
    names = [gaussian_name(v) for v in s.gaussian.sigmas] + [pgd_name(*ball[:2]) for ball in s.pgd.grid]
    names += [strong_name(*ball[:2]) for ball in s.strong.grid]
    return [*names, "smallest-pgd", "smallest-gaussian", "gaussian-of-same-norm"]


def _attack(stored: StoredModel, name: str, attack: Any, norm: Any, strength: float) -> AttackSummary:
    arrays, rules = stored.images(name), stored.rules
    noise = arrays.get("noise_prediction")
    return AttackSummary(
        attack=attack,
        norm=norm,
        strength=strength,
        accuracy=proportion(arrays["prediction"] == arrays["label"], rules.confidence),
        noise_accuracy=None if noise is None else proportion(noise == arrays["label"], rules.confidence),
        distortion=mean(arrays["distortion"][stored.right], rules.confidence, rules.resamples),
        stretch=_stretch(stored, arrays["stretch"][stored.right]),
        depth=_depth(arrays, stored.right),
    )


def strong(stored: StoredModel) -> list[Strong]:
    """The stronger suite in each of its balls, PGD included where its grid has the same ball."""
    s, found = stored.run.settings, []
    for norm, value, eps in s.strong.grid:
        arrays = stored.images(strong_name(norm, value))
        names = [name.removeprefix("stands/") for name in arrays if name.startswith("stands/")]
        stands = {name: arrays[f"stands/{name}"] for name in names}
        if (norm, value, eps) in s.pgd.grid:
            stands = {"PGD": stored.decided(pgd_name(norm, value))} | stands
        worst = np.logical_and.reduce(list(stands.values()))
        confidence = stored.rules.confidence
        members = [Member(name=name, accuracy=proportion(kept, confidence)) for name, kept in stands.items()]
        found.append(Strong(norm=norm, strength=eps, accuracy=proportion(worst, confidence), members=members))
    return found


def smallest(stored: StoredModel, kind: Any) -> Smallest:
    arrays, rules = stored.images(f"smallest-{kind}"), stored.rules
    distortion = arrays["distortion"][stored.right]
    found = np.isfinite(distortion)
    ceiling = arrays["ceiling"][stored.right]
    return Smallest(
        attack=kind,
        found=proportion(found, rules.confidence),
        median=median(distortion, rules.confidence),
        mean=mean(distortion[found], rules.confidence, rules.resamples),
        ceiling=float(arrays["ceiling"].max()),
        mean_with_ceiling=mean(np.where(found, distortion, ceiling), rules.confidence, rules.resamples),
        stretch=_stretch(stored, arrays["stretch"][stored.right][found]),
        depth=_depth(arrays, stored.right & arrays["found"]),
    )


def gaussian_of_same_norm(stored: StoredModel) -> Proportion:
    """Accuracy under noise of the norm of the smallest adversarial perturbation, over images that have one."""
    chosen = stored.right & stored.images("smallest-pgd")["found"]
    return proportion(stored.decided("gaussian-of-same-norm")[chosen], stored.rules.confidence)


def ratios(stored: StoredModel) -> np.ndarray:
    """The ratio of smallest adversarial to smallest Gaussian distortion of each image classified correctly."""
    pgd, noise = (stored.images(f"smallest-{kind}")["distortion"][stored.right] for kind in ("pgd", "gaussian"))
    with np.errstate(invalid="ignore"):  # inf / inf, replaced
        found: np.ndarray = np.where(np.isinf(pgd), np.inf, pgd / noise)
    return found


def largest_stretch(stored: StoredModel) -> float | None:
    """The largest stretch over all perturbations of all measurements."""
    return largest(np.concatenate([stored.images(name)["stretch"] for name in perturbing_measurements(stored.run)]))


def largest(values: np.ndarray) -> float | None:
    """The largest finite value; None where there is none."""
    moved = values[np.isfinite(values)]
    return float(moved.max()) if len(moved) else None


def _stretch(stored: StoredModel, values: np.ndarray) -> Stretch:
    """The stretch over the images that were perturbed at all."""
    moved = values[np.isfinite(values)]
    return Stretch(mean=mean(moved, stored.rules.confidence, stored.rules.resamples), largest=largest(values))


def _depth(arrays: dict[str, np.ndarray], chosen: np.ndarray) -> DepthStretch:
    values = arrays.get("depth_stretch", np.zeros((len(chosen), 0)))[chosen]
    moved = values[np.isfinite(values).all(1)]
    if not len(moved):
        return DepthStretch(mean=[], largest=[])
    return DepthStretch(mean=_digits(moved.mean(0)), largest=_digits(moved.max(0)))


def jacobian(stored: StoredModel) -> Jacobian:
    norm = stored.images("jacobian")["norm"]
    return Jacobian(mean=mean(norm, stored.rules.confidence, stored.rules.resamples), largest=float(norm.max()))


def weights(stored: StoredModel) -> list[WeightSpectrum]:
    arrays = read_spectra(
        stored.run.spectra(stored.trained.name, "weights"), "layer", ("",), {"distance": 1, "dead_taps": 1}
    )
    return [
        WeightSpectrum(
            layer=str(layer),
            rank=len(arrays[layer]),
            largest=float(arrays[layer][0]),
            stable_rank=spectra.stable_rank(arrays[layer]),
            effective_rank=spectra.effective_rank(arrays[layer]),
            distance=float(distance) if np.isfinite(distance) else None,
            dead_taps=float(dead),
            profile=_profile(arrays[layer]),
        )
        for layer, distance, dead in zip(arrays["layer"].tolist(), arrays["distance"], arrays["dead_taps"], strict=True)
    ]


def features(stored: StoredModel) -> tuple[list[FeatureSpectrum], list[Growth]]:
    path = stored.run.spectra(stored.trained.name, "features")
    moved_under = {f"growth/{condition}": 2 for condition in spectra.CONDITIONS[1:]}
    arrays = read_spectra(path, "stage", tuple(f"{c}/" for c in spectra.CONDITIONS), moved_under)
    stages: list[str] = arrays["stage"].tolist()
    values: dict[tuple[Any, str], np.ndarray] = {
        (condition, stage): arrays[f"{condition}/{stage}"] for stage in stages for condition in spectra.CONDITIONS
    }
    found = [
        FeatureSpectrum(
            stage=stage,
            condition=condition,
            rank=len(v),
            largest=float(v[0]),
            stable_rank=spectra.stable_rank(v),
            effective_rank=spectra.effective_rank(v),
            profile=_profile(v),
        )
        for (condition, stage), v in values.items()
    ]
    conditions: tuple[Any, ...] = spectra.CONDITIONS[1:]
    moved = arrays["growth/pgd"][:, 0] > 0
    growth = [
        Growth(
            stage=stage,
            condition=condition,
            relative=mean(arrays[f"growth/{condition}"][moved, i], stored.rules.confidence, stored.rules.resamples),
        )
        for i, stage in enumerate(stages)
        for condition in conditions
    ]
    return found, growth


def corruptions(stored: StoredModel) -> Corruptions:
    arrays, rules = read_corruptions(stored.run.images(stored.trained.name, "corruptions")), stored.rules
    right = arrays["prediction"] == arrays["label"]  # [K, S, N]
    clean = arrays["clean_prediction"] == arrays["label"]
    distortion = arrays["distortion"]
    rows = [
        Corruption(
            corruption=name,
            severity=severity,
            accuracy=proportion(right[k, j], rules.confidence),
            distortion=mean(distortion[k, j], rules.confidence, rules.resamples),
            stretch=_stretch(stored, arrays["stretch"][k, j, clean]),
        )
        for k, name in enumerate(arrays["corruption"].tolist())
        for j, severity in enumerate(arrays["severity"].tolist())
    ]
    return Corruptions(
        source=stored.run.settings.corrupted,
        rows=rows,
        mean=mean(right.mean((0, 1)), rules.confidence, rules.resamples),
        distortion=mean(distortion.mean((0, 1)), rules.confidence, rules.resamples),
    )


def margins(stored: StoredModel, bound: Lipschitz) -> Margins:
    """Certificates from the clean margin over the bound on the difference of two logits."""
    clean = stored.images("clean-attacked")
    with np.errstate(divide="ignore"):
        log10 = np.log10(np.maximum(clean["margin"], 0.0)) - bound["log10_margin"]
    radii = sorted(stored.run.settings.pgd.l2)[:1]
    certified = [
        CertifiedAt(radius=r, accuracy=proportion(stored.right & (log10 > np.log10(r)), stored.rules.confidence))
        for r in radii
    ]
    right = log10[stored.right]
    return Margins(log10_radius=float(np.median(right)) if len(right) else None, certified=certified)


def smoothed(stored: StoredModel) -> Smoothed:
    arrays, s = stored.images("smoothing"), stored.run.settings.smoothing
    right = arrays["prediction"] == arrays["label"]
    confidence = stored.rules.confidence
    return Smoothed(
        sigma=s.sigma,
        samples=s.samples,
        alpha=s.alpha,
        abstains=proportion(arrays["radius"] <= 0, confidence),
        certified=[
            CertifiedAt(
                radius=r, accuracy=proportion(right & (arrays["radius"] > 0) & (arrays["radius"] >= r), confidence)
            )
            for r in (0.0, *(factor * s.sigma for factor in (0.5, 1.0, 1.5)))
        ],
    )


def _profile(values: np.ndarray) -> list[float]:
    """Singular values divided by the largest at eleven equally spaced ranks; zeros where all are 0."""
    at = np.rint(np.linspace(0, len(values) - 1, 11)).astype(int)
    return _digits(values[at] / values[0]) if values[0] > 0 else [0.0] * 11


def _digits(values: np.ndarray) -> list[float]:
    """The values rounded to six significant digits, the precision of float32."""
    return [float(f"{v:.6g}") for v in values.tolist()]
