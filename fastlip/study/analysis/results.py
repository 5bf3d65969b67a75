"""The contents of results.json, computed from the measurements: every number with its sample size and interval."""

import numpy as np

from fastlip.study.analysis import summaries
from fastlip.study.analysis.comparisons import comparisons
from fastlip.study.analysis.correlation_answer import CASES
from fastlip.study.analysis.points import points
from fastlip.study.analysis.statistics import median, proportion
from fastlip.study.analysis.summaries import StoredModel
from fastlip.study.analysis.verdicts import verdicts
from fastlip.study.measure.perturbed_images import depth_points
from fastlip.study.settings.training import TRANSFER
from fastlip.study.storage.files import write_json
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.storage.schema import (
    SCHEMA,
    Comparison,
    DeckRow,
    Lipschitz,
    Model,
    Point,
    Power,
    Results,
    Training,
    TrainingRecord,
    Transfer,
)
from fastlip.study.training.architectures import build

#: Rows of the slide deck behind this project. Its 93.75% and 88.54% are 90 and 85 of 96 images. The deck does not state
#: the scale of its average distortion, nor what its upper Lipschitz constant bounds.
_DECK = (
    ("fine-tuned", "Gaussian", 33.70, 1.33, 90),
    ("fine-tuned", "PGD", 12.29, 2.51, 90),
    ("scratch", "Gaussian", 124.21, 1.38, 85),
    ("scratch", "PGD", 6.08, 3.81, 85),
)
_DECK_IMAGES = 96


def write(run: RunDirectory, source_name: str) -> str:
    """Write results.json; return the verdicts in a few words."""
    found = analyse(run, source_name)
    write_json(run.results, found)
    return ", ".join(f"question {v['number']} {v['verdict']}" for v in found["verdicts"])


def analyse(run: RunDirectory, source_name: str) -> Results:
    """The contents of results.json, from the files of all earlier stages."""
    s = run.settings
    models = [_model(run, trained) for trained in run.models]
    compared, data_points = comparisons(run), points(run)
    transfer: list[Transfer] = []
    return Results(
        schema=SCHEMA,
        preset=s.preset,
        dataset=models[0]["dataset"],
        classes=read(run.training(run.models[0].name), TrainingRecord)["classes"],
        generated=s.dataset == "generated",
        source=source_name if s.transfers else "none",
        models=models,
        points=data_points,
        comparisons=compared,
        transfer=transfer,
        verdicts=verdicts(models, compared, data_points, transfer, s.rules, one_source=s.sources == "one"),
        power=_had(run.config["power"], compared, data_points),
        seed_deck=[
            DeckRow(
                model=model,
                attack=attack,
                average_distortion=distortion,
                upper_lipschitz_constant=constant,
                clean_accuracy=proportion(np.arange(_DECK_IMAGES) < right, s.rules.confidence),
            )
            for model, attack, distortion, constant, right in _DECK
        ],
    )


def _model(run: RunDirectory, trained: TrainedModel) -> Model:
    s = run.settings
    stored = StoredModel(run, trained)
    confidence = s.rules.confidence
    training = read(run.training(trained.name), TrainingRecord)
    clean = stored.decided("clean")
    ratios = summaries.ratios(stored)
    bound = read(run.lipschitz(trained.name), Lipschitz)
    features, growth = summaries.features(stored)
    return Model(
        name=trained.name,
        arm=trained.arm,
        seed=trained.seed,
        dataset=training["data"],
        architecture=s.architecture_of(trained.arm),
        additional_data=trained.arm in TRANSFER,
        clean_acc=100.0 * float(clean.mean()),
        clean=proportion(clean, confidence),
        attacked_clean=proportion(stored.right, confidence),
        training=Training(
            images=training["images"],
            epochs=training["epochs"],
            processes=training["processes"],
            loss=training["loss"],
            accuracy=training["accuracy"],
        ),
        attacks=summaries.attacks(stored),
        strong=summaries.strong(stored),
        smallest_pgd=summaries.smallest(stored, "pgd"),
        smallest_gaussian=summaries.smallest(stored, "gaussian"),
        gaussian_of_same_norm=summaries.gaussian_of_same_norm(stored),
        ratio_median=median(ratios, confidence),
        largest_stretch=summaries.largest_stretch(stored),
        depth_points=depth_points(build(s.architecture_of(trained.arm), 2, s.stem, 0)),
        lipschitz=bound,
        jacobian=summaries.jacobian(stored),
        weights=summaries.weights(stored),
        features=features,
        growth=growth,
        corruptions=summaries.corruptions(stored),
        margins=summaries.margins(stored, bound),
        smoothing=summaries.smoothed(stored),
    )


def _had(rows: list[Power], comparisons: list[Comparison], points: list[Point]) -> list[Power]:
    """The power note of config.json with the sample sizes of this run."""
    paired = {
        arm: [c["difference"]["n"] for c in comparisons if c["arm"] == arm and c["measure"] == "log ratio"]
        for arm in ("scratch", "finetune")
    }
    seeds = {c["seed"] for c in comparisons if (c["arm"], c["against"]) == ("finetune", "scratch")}
    runs = [len({p["run"] for p in points if p["arm"] == case}) for case in CASES]
    had = {1: min(paired["scratch"], default=0), 2: min(paired["finetune"], default=0), 3: len(seeds), 4: min(runs)}
    return [Power(**(row | {"had": had[row["question"]]})) for row in rows]
