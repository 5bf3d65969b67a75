"""The stages that take over checkpoints which the study did not train, so that they are measured like its own."""

from functools import partial

from fastlip.models import save_checkpoint
from fastlip.study.measure.images import Progress
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stage import Stage
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.training.architectures import description


def checkpoint_stages(run: RunDirectory, inputs: Inputs) -> list[Stage]:
    """A stage for each of the run's checkpoints, which writes the run's own copy of it."""
    if not run.settings.checkpoints:
        return []
    return [
        Stage(f"{model.name}: import", (run.checkpoint(model.name),), partial(_import, run, inputs, model))
        for model in run.models
    ]


def _import(run: RunDirectory, inputs: Inputs, model: TrainedModel, progress: Progress) -> str:
    network, words = inputs.given_network(model.arm)
    images = inputs.target_attacked
    path = run.checkpoint(model.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_for = {"images": images.name, "classes": str(len(images.classes)), "input": words}
    save_checkpoint(path, network, made_for | description(run.settings, model.arm))
    return f"{run.settings.architecture_of(model.arm)}, {words}"
