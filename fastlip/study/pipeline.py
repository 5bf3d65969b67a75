"""The stages of a run, in order; each writes its outputs atomically and is skipped where they are already there."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from fastlip.data import ImageSet
from fastlip.models import load_backbone, load_checkpoint, save_checkpoint
from fastlip.study import analysis, measure, report
from fastlip.study.certified import certified
from fastlip.study.config import TRANSFER, Schedule
from fastlip.study.errors import StudyError
from fastlip.study.files import read_arrays, write_arrays, write_json
from fastlip.study.inputs import Inputs, build
from fastlip.study.measure import Arrays, Images, Progress
from fastlip.study.rundir import RunDirectory, Trained, gaussian_name, pgd_name
from fastlip.study.training import train

Measurement = Callable[[nn.Module, int, Progress], Arrays]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique, as shown and timed.
        outputs: files that are all there once it is done.
        run: does it; returns a few words on what came out.
    """

    name: str
    outputs: tuple[Path, ...]
    run: Callable[[Progress], str]

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.outputs)


def stages(run: RunDirectory, inputs: Inputs) -> list[Stage]:
    """All stages of the run, each to be finished before the next is begun."""
    work = _Work(run, inputs)
    found = []
    if run.pretrains:
        outputs = (run.checkpoint("source"), run.training("source"))
        found.append(Stage("source: pre-training", outputs, work.pretrain))
    for model in run.models:
        if model.arm == "lpft":
            outputs = (run.checkpoint(_probe(model)), run.training(_probe(model)))
            found.append(Stage(f"{model.name}: training of the head", outputs, partial(work.probe, model)))
        outputs = (run.checkpoint(model.name), run.training(model.name))
        found.append(Stage(f"{model.name}: training", outputs, partial(work.train, model)))
    for model in run.models:
        for name, measurement in work.measurements(model):
            output = run.images(model.name, name)
            found.append(Stage(f"{model.name}: {name}", (output,), partial(work.measure, model, name, measurement)))
        found.append(Stage(f"{model.name}: norms", (run.lipschitz(model.name),), partial(work.norms, model)))
    found.append(Stage("results", (run.results,), lambda progress: analysis.write(run, inputs.source_name)))
    found.append(Stage("report", (run.report,), lambda progress: report.write(run)))
    return found


class _Work:
    """What the stages do."""

    def __init__(self, run: RunDirectory, inputs: Inputs) -> None:
        self.run = run
        self.inputs = inputs
        self.device = torch.device(run.machine.device)
        self.loaded: tuple[str, nn.Module] | None = None

    @cached_property
    def attacked(self) -> Images:
        return Images(self.inputs.target_attacked, self.device, self.run.settings.evaluation.batch_size)

    @cached_property
    def all_clean(self) -> Images:
        return Images(self.inputs.target_clean, self.device, self.run.settings.evaluation.batch_size)

    def pretrain(self, progress: Progress) -> str:
        s, images = self.run.settings, self.inputs.source_train
        network = build(s.architecture, len(images.classes), s.stem, seeded(s.seed, "source weights"))
        return self._train("source", network, images, s.pretrain, s.seed, progress)

    def train(self, model: Trained, progress: Progress) -> str:
        network, images = self._untrained(model)
        if model.arm == "lpft":
            self._load_own(network, self.run.checkpoint(_probe(model)), model)
        stage, head = network.get_submodule("network.layer4"), network.get_submodule("network.fc")
        parts = {"linear": [head], "partial": [stage, head]}.get(model.arm)
        schedule = self.run.settings.schedule(model.arm)
        return self._train(model.name, network, images, schedule, model.seed, progress, parts)

    def probe(self, model: Trained, progress: Progress) -> str:
        """The first half of LP-FT (Kumar et al. 2022): the head alone."""
        network, images = self._untrained(model)
        head, schedule = network.get_submodule("network.fc"), self.run.settings.finetune
        return self._train(_probe(model), network, images, schedule, model.seed, progress, [head])

    def _untrained(self, model: Trained) -> tuple[nn.Sequential, ImageSet]:
        """What an arm starts from, and its training images."""
        s = self.run.settings
        images = self.inputs.target_train(s.schedule(model.arm).images)
        network = build(s.architecture_of(model.arm), len(images.classes), s.stem, seeded(model.seed, "weights"))
        if model.arm in TRANSFER:
            pretrained = self.run.checkpoint("source")
            load_backbone(network, weights_at(pretrained) if self.run.pretrains else self.inputs.source_weights())
        return network, images

    def measurements(self, model: Trained) -> list[tuple[str, Measurement]]:
        """What is measured on images, in order, by name."""
        s = self.run.settings
        found: list[tuple[str, Measurement]] = [
            ("clean", lambda network, seed, progress: measure.clean(network, self.all_clean, progress)),
            ("clean-attacked", lambda network, seed, progress: measure.clean(network, self.attacked, progress)),
        ]
        for sigma in s.gaussian.sigmas:
            found.append((gaussian_name(sigma), partial(self._gaussian, sigma)))
        for norm, strength, eps in s.pgd.grid:
            found.append((pgd_name(norm, strength), partial(self._pgd, norm, eps)))
        found.append(("smallest-pgd", self._smallest_adversarial))
        found.append(("smallest-gaussian", self._smallest_gaussian))
        found.append(("gaussian-of-same-norm", partial(self._gaussian_of_norm, model)))
        return found

    def measure(self, model: Trained, name: str, measurement: Measurement, progress: Progress) -> str:
        # The seed leaves the arm out: all arms meet the same noise and the same random starts.
        arrays = measurement(self._load(model), seeded(model.seed, name), progress)
        write_arrays(self.run.images(model.name, name), arrays)
        return _in_words(arrays)

    def norms(self, model: Trained, progress: Progress) -> str:
        shape = tuple(self.attacked.pixels.shape[1:])
        seed = seeded(model.seed, "norms", model.arm)
        found = certified(self._load(model), (shape[0], shape[1], shape[2]), self.run.settings.lipschitz.eta, seed)
        write_json(self.run.lipschitz(model.name), found)
        return f"{len(found['layers'])} layers, upper Lipschitz constant 10^{found['log10_upper']:.2f}"

    def _gaussian(self, sigma: float, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return measure.gaussian(network, self.attacked, sigma, seed, progress)

    def _pgd(self, norm: str, eps: float, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return measure.projected_gradient(network, self.attacked, norm, eps, self.run.settings, seed, progress)

    def _smallest_adversarial(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return measure.smallest_adversarial(network, self.attacked, self.run.settings, progress)

    def _smallest_gaussian(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return measure.smallest_gaussian(network, self.attacked, self.run.settings, seed, progress)

    def _gaussian_of_norm(self, model: Trained, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        l2 = read_arrays(self.run.images(model.name, "smallest-pgd"))["l2"]
        return measure.gaussian_of_norm(network, self.attacked, l2, seed, progress)

    def _train(
        self,
        name: str,
        network: nn.Module,
        images: ImageSet,
        schedule: Schedule,
        seed: int,
        progress: Progress,
        parts: list[nn.Module] | None = None,
    ) -> str:
        state = self.run.training_state(name)
        history = train(
            network.to(self.device),
            images.images,
            images.labels,
            schedule,
            seed=seeded(seed, "order", name),
            precision=getattr(torch, self.run.machine.precision),
            state_path=state,
            save_seconds=self.run.settings.save_seconds,
            progress=progress,
            parts=parts,
        )
        path = self.run.checkpoint(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, network, {"images": images.name, "classes": str(len(images.classes))})
        write_json(
            self.run.training(name),
            {
                "images": len(images),
                "data": images.name,
                "classes": list(images.classes),
                "epochs": schedule.epochs,
                "loss": history.loss,
                "accuracy": history.accuracy,
            },
        )
        state.unlink(missing_ok=True)
        return f"loss {history.loss[-1]:.3f}, accuracy {history.accuracy[-1]:.1%} on augmented training images"

    def _load(self, model: Trained) -> nn.Module:
        """The trained network from its checkpoint; the last one asked for is kept."""
        if self.loaded is None or self.loaded[0] != model.name:
            s, path = self.run.settings, self.run.checkpoint(model.name)
            network = build(s.architecture_of(model.arm), len(self.inputs.target_attacked.classes), s.stem, 0)
            self._load_own(network, path, model)
            network = network.to(self.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
            self.loaded = (model.name, network)
        return self.loaded[1]

    def _load_own(self, network: nn.Module, path: Path, model: Trained) -> None:
        try:
            network.load_state_dict(weights_at(path))
        except RuntimeError:
            raise StudyError(f"{path} holds another network; delete it to train {model.name} again") from None


def _probe(model: Trained) -> str:
    """Name of what LP-FT has trained before its second half."""
    return f"{model.name}-head"


def weights_at(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one of the run's own checkpoints."""
    try:
        return load_checkpoint(path)[0]
    except (OSError, ValueError) as error:
        raise StudyError(f"{error}; delete {path} and run the same command again") from None


def seeded(seed: int, *purpose: str) -> int:
    """A 63-bit seed for one purpose, so that no two draws of a run share a stream."""
    digest = hashlib.sha256("/".join(["fastlip.study", str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _in_words(arrays: Arrays) -> str:
    right = arrays["prediction"] == arrays["label"]
    return f"{int(right.sum())} of {len(right)} images classified correctly"
