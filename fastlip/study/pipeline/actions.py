"""What the stages of a run do."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastlip.data import ImageSet
from fastlip.models import load_backbone, load_checkpoint, save_checkpoint
from fastlip.study.errors import StudyError
from fastlip.study.measure import attacks, clean_images, corruptions, smoothing, spectra, strong_attacks
from fastlip.study.measure.certified_bounds import bounded, certified
from fastlip.study.measure.images import Arrays, Images, Progress, merged
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.settings.attacks import Ball
from fastlip.study.settings.training import TRANSFER, Schedule
from fastlip.study.storage.array_files import read_measured
from fastlip.study.storage.files import AGAIN, damaged, write_arrays, write_json
from fastlip.study.storage.run_directory import RunDirectory, Trained, gaussian_name, pgd_name, strong_name
from fastlip.study.training.networks import build
from fastlip.study.training.process_group import Team
from fastlip.study.training.train import train


@dataclass(frozen=True)
class Measurement:
    """What is measured on images.

    Attributes:
        run: takes the network, the measurement's seed and who hears of its progress.
        needs: measurements that it reads.
        sharded: whether a team splits it by batches.
    """

    run: Callable[[nn.Module, int, Progress], Arrays]
    needs: tuple[str, ...] = ()
    sharded: bool = True


class Work:
    """What the stages do."""

    def __init__(self, run: RunDirectory, inputs: Inputs, team: Team) -> None:
        self.run = run
        self.inputs = inputs
        self.team = team
        self.device = team.device(run.machine.device)
        self.loaded: tuple[str, nn.Module] | None = None

    @cached_property
    def attacked(self) -> Images:
        size = self.run.settings.evaluation.batch_size
        return Images(self.inputs.target_attacked, self.device, size).share(self.team.rank, self.team.size)

    @cached_property
    def all_clean(self) -> Images:
        size = self.run.settings.evaluation.batch_size
        return Images(self.inputs.target_clean, self.device, size).share(self.team.rank, self.team.size)

    def transfers(self, model: Trained) -> bool:
        return model.arm in TRANSFER

    def pretrain(self, progress: Progress) -> str:
        s, images = self.run.settings, self.inputs.source_train
        network = build(s.architecture, len(images.classes), s.stem, seeded(s.seed, "source weights"))
        return self._train("source", network, images, s.pretrain, s.seed, progress)

    def train(self, model: Trained, progress: Progress) -> str:
        network, images = self._untrained(model)
        if model.arm == "lpft":
            self._load_own(network, self.run.checkpoint(probe_name(model)), model)
        stage, head = network.get_submodule("network.layer4"), network.get_submodule("network.fc")
        parts = {"linear": [head], "partial": [stage, head]}.get(model.arm)
        schedule = self.run.settings.schedule(model.arm)

        def keep(epoch: int) -> None:
            snapshot = Trained(model.arm, model.seed, epoch)
            if snapshot in self.run.snapshots:
                self._save(snapshot.name, network, images)

        return self._train(model.name, network, images, schedule, model.seed, progress, parts, keep)

    def probe(self, model: Trained, progress: Progress) -> str:
        """The first half of LP-FT (Kumar et al. 2022): the head alone."""
        network, images = self._untrained(model)
        head, schedule = network.get_submodule("network.fc"), self.run.settings.finetune
        return self._train(probe_name(model), network, images, schedule, model.seed, progress, [head])

    def _untrained(self, model: Trained) -> tuple[nn.Sequential, ImageSet]:
        """What an arm starts from, and its training images."""
        s = self.run.settings
        images = self.inputs.target_train(s.schedule(model.arm).images)
        return self._start(model, len(images.classes)), images

    def _start(self, model: Trained, classes: int) -> nn.Sequential:
        s = self.run.settings
        network = build(s.architecture_of(model.arm), classes, s.stem, seeded(model.seed, "weights"))
        if self.transfers(model):
            pretrained = self.run.checkpoint("source")
            weights = weights_at(pretrained) if self.run.pretrains else self.inputs.source_weights()
            try:
                load_backbone(network, weights)
            except ValueError as error:
                # Weights that were given were looked at before anything began.
                raise damaged(pretrained, error) from None
        return network

    def measurements(self, model: Trained) -> dict[str, Measurement]:
        """What is measured on images, in order, by name; of a snapshot only what question 4 needs."""
        s = self.run.settings
        if model.epoch is not None:
            some = self.attacked.first(s.evaluation.snapshot_images)
            return {
                "clean-attacked": Measurement(partial(self._clean, some)),
                "smallest-pgd": Measurement(partial(self._smallest_adversarial, some)),
            }
        found = {
            "clean": Measurement(partial(self._clean, self.all_clean)),
            "clean-attacked": Measurement(partial(self._clean, self.attacked)),
        }
        for sigma in s.gaussian.sigmas:
            found[gaussian_name(sigma)] = Measurement(partial(self._gaussian, sigma))
        for ball in s.pgd.grid:
            found[pgd_name(*ball[:2])] = Measurement(partial(self._pgd, ball))
        for ball in s.strong.grid:
            found[strong_name(*ball[:2])] = Measurement(partial(self._strong, ball))
        found["smallest-pgd"] = Measurement(partial(self._smallest_adversarial, self.attacked))
        found["smallest-gaussian"] = Measurement(self._smallest_gaussian)
        found["gaussian-of-same-norm"] = Measurement(partial(self._gaussian_of_norm, model), ("smallest-pgd",))
        found["jacobian"] = Measurement(self._jacobian)
        found["smoothing"] = Measurement(self._smoothing)
        found["corruptions"] = Measurement(self._corruptions, sharded=False)
        return found

    def measure(self, model: Trained, name: str, measurement: Measurement, progress: Progress) -> str:
        # The seed leaves the arm out: all arms meet the same noise and the same random starts.
        arrays = measurement.run(self._load(model), seeded(model.seed, name), progress)
        if measurement.sharded:
            arrays = merged(self.team.gather(arrays))
        if self.team.leads:
            write_arrays(self.run.images(model.name, name), arrays)
        return _in_words(arrays)

    def norms(self, model: Trained, progress: Progress) -> str:
        channels, height, width = self.attacked.pixels.shape[1:]
        seed = seeded(model.seed, "norms", model.name)
        # One probability of failure for the run: every model whose norms are drawn takes its share.
        eta = self.run.settings.lipschitz.eta / (len(self.run.models) + len(self.run.snapshots))
        measured = certified if model.epoch is None else bounded
        found = measured(self._load(model), (channels, height, width), eta, seed)
        write_json(self.run.lipschitz(model.name), found)
        return f"upper Lipschitz constant 10^{found['log10_upper']:.2f}"

    def weight_spectra(self, model: Trained, progress: Progress) -> str:
        """The distance is from the source for transfer arms, and from their own first weights for the others."""
        start = self._start(model, len(self.inputs.target_attacked.classes)).state_dict()
        arrays = spectra.weights(self._load(model), start)
        write_arrays(self.run.spectra(model.name, "weights"), arrays)
        return f"{len(arrays['layer'])} layers"

    def feature_spectra(self, model: Trained, progress: Progress) -> str:
        s = self.run.settings
        ball = next(b for b in s.pgd.grid if b[:2] == ("linf", s.rules.compared_linf_255))
        seed = seeded(model.seed, pgd_name(*ball[:2]))
        arrays = spectra.features(self._load(model), self.attacked.share(0, 1), ball, s, seed, progress)
        write_arrays(self.run.spectra(model.name, "features"), arrays)
        return f"{len(arrays['stage'])} stages"

    def _clean(self, images: Images, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return clean_images.clean(network, images, progress)

    def _gaussian(self, sigma: float, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.gaussian(network, self.attacked, sigma, seed, progress)

    def _pgd(self, ball: Ball, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.projected_gradient(network, self.attacked, ball, self.run.settings, seed, progress)

    def _strong(self, ball: Ball, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return strong_attacks.suite(network, self.attacked, ball, self.run.settings.strong, seed, progress)

    def _smallest_adversarial(self, images: Images, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.smallest_adversarial(network, images, self.run.settings, progress)

    def _smallest_gaussian(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.smallest_gaussian(network, self.attacked, self.run.settings, seed, progress)

    def _gaussian_of_norm(self, model: Trained, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        l2 = read_measured(self.run.images(model.name, "smallest-pgd"))["l2"]
        return attacks.gaussian_of_norm(network, self.attacked, l2, seed, progress)

    def _jacobian(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return clean_images.jacobian(network, self.attacked, self.run.settings, seed, progress)

    def _smoothing(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return smoothing.smoothed(network, self.attacked, self.run.settings.smoothing, seed, progress)

    def _corruptions(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        s = self.run.settings.corruptions
        chosen = self.attacked.share(0, 1).first(s.images)
        files, names = self.inputs.corrupted_files, self.inputs.corruption_names
        return corruptions.corrupted(network, chosen, s.severities, files, names, seed, progress)

    def _train(
        self,
        name: str,
        network: nn.Module,
        images: ImageSet,
        schedule: Schedule,
        seed: int,
        progress: Progress,
        parts: list[nn.Module] | None = None,
        keep: Callable[[int], None] | None = None,
    ) -> str:
        state, machine = self.run.training_state(name), self.run.machine
        history = train(
            network.to(self.device),
            images.images,
            images.labels,
            schedule,
            seed=seeded(seed, "order", name),
            precision=getattr(torch, machine.precision),
            state_path=state,
            save_seconds=self.run.settings.save_seconds,
            progress=progress,
            parts=parts,
            keep=keep,
            team=self.team,
            compiled=machine.compiled,
        )
        if self.team.leads:
            self._save(name, network, images)
            write_json(
                self.run.training(name),
                {
                    "images": len(images),
                    "data": images.name,
                    "classes": list(images.classes),
                    "epochs": schedule.epochs,
                    "processes": self.team.size,
                    "loss": history.loss,
                    "accuracy": history.accuracy,
                },
            )
            state.unlink(missing_ok=True)
        return f"loss {history.loss[-1]:.3f}, accuracy {history.accuracy[-1]:.1%} on augmented training images"

    def _save(self, name: str, network: nn.Module, images: ImageSet) -> None:
        path = self.run.checkpoint(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, network, {"images": images.name, "classes": str(len(images.classes))})

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


def probe_name(model: Trained) -> str:
    """Name of what LP-FT has trained before its second half."""
    return f"{model.run_name}-head"


def weights_at(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one of the run's own checkpoints."""
    try:
        return load_checkpoint(path)[0]
    except ValueError as error:
        raise StudyError(f"{error}; {AGAIN}") from None


def seeded(seed: int, *purpose: str) -> int:
    """A 63-bit seed for one purpose, so that no two draws of a run share a stream."""
    digest = hashlib.sha256("/".join(["fastlip.study", str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _in_words(arrays: Arrays) -> str:
    if "norm" in arrays:
        return f"Jacobian norm at {len(arrays['norm'])} images, median {float(np.median(arrays['norm'])):.3g}"
    if "found" in arrays:
        # An image that is misclassified as it is needs no perturbation.
        distortion = arrays["distortion"][arrays["found"] & (arrays["distortion"] > 0)]
        middle = f", median distortion x 255 {255 * float(np.median(distortion)):.3g}" if distortion.size else ""
        return f"smallest perturbations of {distortion.size} images{middle}"
    right = arrays["prediction"] == arrays["label"]
    return f"{int(right.sum())} of {right.size} images classified correctly"
