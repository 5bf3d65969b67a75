"""The stages that train the source and the models of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastlip.data import ImageSet
from fastlip.models import save_checkpoint
from fastlip.study.measure.images import Progress
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.networks import Networks, load_into
from fastlip.study.pipeline.stage import Stage, derived_seed
from fastlip.study.settings.training import Schedule
from fastlip.study.storage.files import write_json
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.training.architectures import SOURCE, build, description, parts
from fastlip.study.training.process_group import ProcessGroup
from fastlip.study.training.train import train


def training_stages(run: RunDirectory, inputs: Inputs, networks: Networks, group: ProcessGroup) -> list[Stage]:
    """The stages that train: the sources first, where the run trains them, then every model."""
    training = _Training(run, inputs, networks, group)
    found: list[Stage] = []
    for source, seed in run.sources.items():
        outputs: tuple[Path, ...] = (run.checkpoint(source), run.training(source))
        action = partial(training.pretrain, source, seed)
        found.append(Stage(f"{source}: pre-training", outputs, action, collective=True))
    for model in run.models if run.settings.arms else ():
        start = run.source_of(model)
        needs: tuple[Path, ...] = (run.checkpoint(start),) if start else ()
        if model.arm == "lpft":
            probe = _probe_name(model)
            outputs = (run.checkpoint(probe), run.training(probe))
            name = f"{model.name}: training of the head"
            found.append(Stage(name, outputs, partial(training.probe, model), needs, collective=True))
            needs = outputs
        kept = tuple(run.checkpoint(m.name) for m in run.snapshots if m.run_name == model.name)
        outputs = (run.checkpoint(model.name), run.training(model.name), *kept)
        found.append(Stage(f"{model.name}: training", outputs, partial(training.train, model), needs, collective=True))
    return found


class _Training:
    """Carries out the stages that train."""

    def __init__(self, run: RunDirectory, inputs: Inputs, networks: Networks, group: ProcessGroup) -> None:
        self.run = run
        self.inputs = inputs
        self.networks = networks
        self.group = group

    def pretrain(self, name: str, seed: int, progress: Progress) -> str:
        s, images = self.run.settings, self.inputs.source_train
        network = build(s, SOURCE, len(images.classes), derived_seed(seed, "source weights"))
        return self._train(name, SOURCE, network, parts(s, SOURCE, network).head, images, s.pretrain, seed, progress)

    def train(self, model: TrainedModel, progress: Progress) -> str:
        network, images = self._untrained(model)
        if model.arm == "lpft":
            load_into(network, self.run.checkpoint(_probe_name(model)), model)
        found = self.networks.parts(model, network)
        trained = {"linear": [found.head], "partial": found.tail}.get(model.arm)
        schedule = self.run.settings.schedule(model.arm)

        def keep(epoch: int) -> None:
            snapshot = TrainedModel(model.arm, model.seed, epoch)
            if snapshot in self.run.snapshots:
                self._save(snapshot.name, model.arm, network, images)

        bound = self.run.settings.norm_bound(model.arm, model.seed)
        return self._train(
            model.name, model.arm, network, found.head, images, schedule, model.seed, progress, trained, keep, bound
        )

    def probe(self, model: TrainedModel, progress: Progress) -> str:
        """Train the head alone, the first half of LP-FT (Kumar et al. 2022)."""
        network, images = self._untrained(model)
        head, schedule = self.networks.parts(model, network).head, self.run.settings.finetune
        name = _probe_name(model)
        return self._train(name, model.arm, network, head, images, schedule, model.seed, progress, [head])

    def _untrained(self, model: TrainedModel) -> tuple[nn.Sequential, ImageSet]:
        """The network that an arm starts from, and its training images."""
        images = self.inputs.target_train(model.arm)
        return self.networks.untrained(model, len(images.classes)), images

    def _train(
        self,
        name: str,
        arm: str,
        network: nn.Module,
        head: str,
        images: ImageSet,
        schedule: Schedule,
        seed: int,
        progress: Progress,
        trained: list[str] | None = None,
        keep: Callable[[int], None] | None = None,
        norm_bound: float | None = None,
    ) -> str:
        state, machine = self.run.training_state(name), self.run.machine
        history = train(
            network.to(self.networks.device),
            images.images,
            images.labels,
            schedule,
            seed=derived_seed(seed, "order", name),
            precision=getattr(torch, machine.precision),
            state_path=state,
            save_seconds=self.run.settings.save_seconds,
            progress=progress,
            head=network.get_submodule(head),
            parts=None if trained is None else [network.get_submodule(name) for name in trained],
            keep=keep,
            group=self.group,
            compiled=machine.compiled,
            norm_bound=norm_bound,
        )
        if self.group.leads:
            self._save(name, arm, network, images)
            write_json(
                self.run.training(name),
                {
                    "images": len(images),
                    "data": images.name,
                    "classes": list(images.classes),
                    "epochs": schedule.epochs,
                    "processes": self.group.size,
                    "loss": history.loss,
                    "accuracy": history.accuracy,
                },
            )
            state.unlink(missing_ok=True)
        return f"loss {history.loss[-1]:.3f}, accuracy {history.accuracy[-1]:.1%} on augmented training images"

    def _save(self, name: str, arm: str, network: nn.Module, images: ImageSet) -> None:
        path = self.run.checkpoint(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        made_for = {"images": images.name, "classes": str(len(images.classes))}
        save_checkpoint(path, network, made_for | description(self.run.settings, arm))


def _probe_name(model: TrainedModel) -> str:
    """Name of the checkpoint between the two halves of LP-FT."""
    return f"{model.run_name}-head"
