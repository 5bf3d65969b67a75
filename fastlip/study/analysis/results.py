"""The contents of results.json, computed from the measurements: every number with its sample size and interval."""

import numpy as np

from fastlip.data import ImageSet
from fastlip.metrics import flat_boundary_ratio
from fastlip.study.analysis import summaries
from fastlip.study.analysis.comparisons import comparisons
from fastlip.study.analysis.correlation_answer import CASES
from fastlip.study.analysis.points import points
from fastlip.study.analysis.statistics import median, proportion
from fastlip.study.analysis.summaries import StoredModel
from fastlip.study.analysis.titles import model_title
from fastlip.study.analysis.transfer_table import transfer_table
from fastlip.study.analysis.verdicts import verdicts
from fastlip.study.storage.files import write_json
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.storage.schema import (
    SCHEMA,
    Comparison,
    DeckRow,
    FlatBoundary,
    Lipschitz,
    Model,
    Point,
    Power,
    Results,
)
from fastlip.study.training.architectures import build, parts

#: Rows of the slide deck behind this project. Its 93.75% and 88.54% are 90 and 85 of 96 images. The deck does not state
#: the scale of its average distortion, nor what its upper Lipschitz constant bounds.
_DECK = (
    ("fine-tuned", "Gaussian", 33.70, 1.33, 90),
    ("fine-tuned", "PGD", 12.29, 2.51, 90),
    ("scratch", "Gaussian", 124.21, 1.38, 85),
    ("scratch", "PGD", 6.08, 3.81, 85),
)
_DECK_IMAGES = 96


def write(run: RunDirectory, source_name: str, data: ImageSet) -> str:
    """Write results.json; return the verdicts in a few words. Arguments are those of :func:`analyse`."""
    found = analyse(run, source_name, data)
    write_json(run.results, found)
    return ", ".join(f"question {v['number']} {v['verdict']}" for v in found["verdicts"])


def analyse(run: RunDirectory, source_name: str, data: ImageSet) -> Results:
    """The contents of results.json, from the files of all earlier stages.

    Args:
        run: the run.
        source_name: the source of the transfer arms in words.
        data: the attacked images.
    """
    s = run.settings
    models = [_model(run, trained, data) for trained in run.models]
    compared, data_points, transfer = comparisons(run), points(run), transfer_table(run)
    return Results(
        schema=SCHEMA,
        preset=s.preset,
        dataset=data.name,
        classes=list(data.classes),
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


def _model(run: RunDirectory, trained: TrainedModel, data: ImageSet) -> Model:
    s = run.settings
    stored = StoredModel(run, trained)
    confidence = s.rules.confidence
    clean = stored.decided("clean")
    ratios = summaries.ratios(stored)
    bound = read(run.lipschitz(trained.name), Lipschitz)
    features, growth = summaries.features(stored)
    network = build(s, trained.arm, len(data.classes), 0)
    dimensions = data.images[0].numel()
    return Model(
        name=trained.name,
        title=model_title(s, trained),
        arm=trained.arm,
        role=s.role_of(trained.arm),
        seed=trained.seed,
        dataset=data.name,
        architecture=s.architecture_of(trained.arm),
        parameters=sum(p.numel() for p in network.parameters()),
        additional_data=s.role_of(trained.arm) == "transfer",
        clean_acc=100.0 * float(clean.mean()),
        clean=proportion(clean, confidence),
        attacked_clean=proportion(stored.right, confidence),
        training=summaries.training(stored),
        attacks=summaries.attacks(stored),
        strong=summaries.strong(stored),
        smallest_pgd=summaries.smallest(stored, "pgd"),
        smallest_gaussian=summaries.smallest(stored, "gaussian"),
        gaussian_of_same_norm=summaries.gaussian_of_same_norm(stored),
        ratio_median=median(ratios, confidence),
        flat_boundary=FlatBoundary(
            dimensions=dimensions,
            directions=s.smallest.directions,
            ratio=flat_boundary_ratio(dimensions, s.smallest.directions),
        ),
        largest_stretch=summaries.largest_stretch(stored),
        depth_points=parts(s, trained.arm, network).points,
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
