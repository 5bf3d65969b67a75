"""From per-image results to results.json: every number with its sample size and interval."""

from typing import Any

import numpy as np

from fastlip.study.config import TRANSFER
from fastlip.study.files import read_arrays, read_json, write_json
from fastlip.study.rundir import RunDirectory, Trained, gaussian_name, pgd_name
from fastlip.study.schema import SCHEMA, Attack, Comparison, DeckRow, Model, Results, Smallest, Stretch, Training
from fastlip.study.statistics import mean, median, paired, rate
from fastlip.study.verdicts import verdicts

#: The slide deck behind this project. 93.75% and 88.54% are 90 and 85 of its 96 images; the scale of its average
#: distortion and the meaning of its upper Lipschitz constant are not stated there.
_DECK = (
    ("fine-tuned", "Gaussian", 33.70, 1.33, 90),
    ("fine-tuned", "PGD", 12.29, 2.51, 90),
    ("scratch", "Gaussian", 124.21, 1.38, 85),
    ("scratch", "PGD", 6.08, 3.81, 85),
)
_DECK_IMAGES = 96


def write(run: RunDirectory, source_name: str) -> str:
    """Write results.json; a few words on what came out."""
    found = analyse(run, source_name)
    write_json(run.results, found)
    return ", ".join(f"question {v['number']} {v['verdict']}" for v in found["verdicts"])


def analyse(run: RunDirectory, source_name: str) -> Results:
    """The contents of results.json, from the files of the stages before."""
    s = run.settings
    models = [_model(run, trained) for trained in run.models]
    return Results(
        schema=SCHEMA,
        preset=s.preset,
        dataset=models[0]["dataset"],
        classes=read_json(run.training(run.models[0].name))["classes"],
        generated=s.dataset == "generated",
        source=source_name if s.transfers else "none",
        models=models,
        comparisons=_comparisons(run),
        verdicts=verdicts(models, s.rules),
        seed_deck=[
            DeckRow(
                model=model,
                attack=attack,
                average_distortion=distortion,
                upper_lipschitz_constant=constant,
                clean_accuracy=rate(np.arange(_DECK_IMAGES) < right, s.rules.confidence),
            )
            for model, attack, distortion, constant, right in _DECK
        ],
    )


def _model(run: RunDirectory, trained: Trained) -> Model:
    s = run.settings
    confidence = s.rules.confidence
    training = read_json(run.training(trained.name))
    clean = _right(_images(run, trained, "clean"))
    right = _right(_images(run, trained, "clean-attacked"))
    pgd, noise = (_images(run, trained, f"smallest-{kind}")["distortion"][right] for kind in ("pgd", "gaussian"))
    with np.errstate(invalid="ignore"):  # inf / inf, replaced
        ratios = np.where(np.isinf(pgd), np.inf, pgd / noise)
    return Model(
        name=trained.name,
        arm=trained.arm,
        seed=trained.seed,
        dataset=training["data"],
        architecture=s.architecture_of(trained.arm),
        additional_data=trained.arm in TRANSFER,
        clean_acc=100.0 * float(clean.mean()),
        clean=rate(clean, confidence),
        attacked_clean=rate(right, confidence),
        training=Training(
            images=training["images"],
            epochs=training["epochs"],
            loss=training["loss"],
            accuracy=training["accuracy"],
        ),
        attacks=[_attack(run, trained, right, *which) for which in _strengths(run)],
        smallest_pgd=_smallest(run, trained, right, "pgd"),
        smallest_gaussian=_smallest(run, trained, right, "gaussian"),
        gaussian_of_same_norm=rate(_right(_images(run, trained, "gaussian-of-same-norm"))[right], confidence),
        ratio_share=rate(ratios <= s.rules.ratio, confidence),
        ratio_median=median(ratios, confidence),
        lipschitz=read_json(run.lipschitz(trained.name)),
        largest_stretch=_largest(np.concatenate([_images(run, trained, name)["stretch"] for name in _perturbed(run)])),
    )


def _strengths(run: RunDirectory) -> list[tuple[str, Any, Any, float]]:
    """File name, attack, norm and strength of each attack at fixed strength."""
    s = run.settings
    found: list[tuple[str, Any, Any, float]] = [(gaussian_name(v), "gaussian", None, v) for v in s.gaussian.sigmas]
    return found + [(pgd_name(norm, strength), "pgd", norm, eps) for norm, strength, eps in s.pgd.grid]


def _perturbed(run: RunDirectory) -> list[str]:
    return [name for name, *_ in _strengths(run)] + ["smallest-pgd", "smallest-gaussian", "gaussian-of-same-norm"]


def _attack(
    run: RunDirectory, trained: Trained, right: np.ndarray, name: str, attack: Any, norm: Any, strength: float
) -> Attack:
    arrays, rules = _images(run, trained, name), run.settings.rules
    return Attack(
        attack=attack,
        norm=norm,
        strength=strength,
        accuracy=rate(_right(arrays), rules.confidence),
        distortion=mean(arrays["distortion"][right], rules.confidence, rules.resamples),
        stretch=_stretch(arrays["stretch"][right], rules.confidence, rules.resamples),
    )


def _smallest(run: RunDirectory, trained: Trained, right: np.ndarray, kind: Any) -> Smallest:
    arrays, rules = _images(run, trained, f"smallest-{kind}"), run.settings.rules
    distortion = arrays["distortion"][right]
    found = np.isfinite(distortion)
    return Smallest(
        attack=kind,
        found=rate(found, rules.confidence),
        median=median(distortion, rules.confidence),
        mean=mean(distortion[found], rules.confidence, rules.resamples),
        stretch=_stretch(arrays["stretch"][right][found], rules.confidence, rules.resamples),
    )


def _stretch(values: np.ndarray, confidence: float, resamples: int) -> Stretch:
    """Of the images that were moved at all."""
    return Stretch(mean=mean(values[np.isfinite(values)], confidence, resamples), largest=_largest(values))


def _largest(values: np.ndarray) -> float | None:
    moved = values[np.isfinite(values)]
    return float(moved.max()) if len(moved) else None


def _comparisons(run: RunDirectory) -> list[Comparison]:
    """Fine-tuned minus scratch, on the images that both classify correctly (distortion) or on all (accuracy)."""
    s, found = run.settings, []
    if not {"scratch", "finetune"} <= set(s.arms):
        return []
    for seed in s.all_seeds:
        pair = [Trained("finetune", seed), Trained("scratch", seed)]
        both = np.logical_and(*(_right(_images(run, m, "clean-attacked")) for m in pair))
        tuned, scratch = (_images(run, m, "smallest-pgd")["distortion"][both] for m in pair)
        difference = paired(tuned, scratch, np.median, s.rules.confidence, s.rules.resamples)
        found.append(Comparison(seed=seed, measure="median smallest distortion", difference=difference))
        under = pgd_name("linf", s.rules.compared_linf_255)
        tuned, scratch = (_right(_images(run, m, under)).astype(float) for m in pair)
        difference = paired(tuned, scratch, np.mean, s.rules.confidence, s.rules.resamples)
        found.append(Comparison(seed=seed, measure="accuracy under PGD", difference=difference))
    return found


def _images(run: RunDirectory, trained: Trained, measurement: str) -> dict[str, np.ndarray]:
    return read_arrays(run.images(trained.name, measurement))


def _right(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return arrays["prediction"] == arrays["label"]
