"""The stages that measure trained models: on images, their norms, their spectra."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from torch import nn

from fastlip.study.measure import attacks, clean_images, corruptions, smoothing, spectra, strong_attacks, transfer
from fastlip.study.measure.certified_bounds import layer_norms_and_bound, network_bound
from fastlip.study.measure.images import Arrays, Images, Progress, merged
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.networks import Networks
from fastlip.study.pipeline.stage import Stage, derived_seed
from fastlip.study.settings.attacks import Ball
from fastlip.study.storage.array_files import read_measured, read_transfer_images
from fastlip.study.storage.files import damaged, write_arrays, write_json
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel, gaussian_name, pgd_name, strong_name
from fastlip.study.training.process_group import ProcessGroup


def measurement_stages(run: RunDirectory, inputs: Inputs, networks: Networks, group: ProcessGroup) -> list[Stage]:
    """The stages that measure every model, then every snapshot, and last transfer between the models.

    A stage comes after those that it reads from.
    """
    measuring = _Measuring(run, inputs, networks, group)
    found = [stage for model in [*run.models, *run.snapshots] for stage in _stages_of(run, measuring, model)]
    for model in run.models if run.settings.transfer.l2 else ():
        made = tuple(run.images(other.name, "transfer-images") for other in measuring.of_one_seed(model))
        output, action = run.images(model.name, "transfer"), partial(measuring.transfer, model)
        found.append(Stage(f"{model.name}: transfer", (output,), action, (run.checkpoint(model.name), *made)))
    return found


def _stages_of(run: RunDirectory, measuring: "_Measuring", model: TrainedModel) -> list[Stage]:
    trained = (run.checkpoint(model.name),)
    found = []
    for name, measurement in measuring.measurements(model).items():
        needs = trained + tuple(run.images(model.name, other) for other in measurement.needs)
        action = partial(measuring.on_images, model, name, measurement)
        output = run.images(model.name, name)
        what = "transfer images" if name == "transfer-images" else name
        found.append(Stage(f"{model.name}: {what}", (output,), action, needs, measurement.sharded))
    found.append(Stage(f"{model.name}: norms", (run.lipschitz(model.name),), partial(measuring.norms, model), trained))
    if model.epoch is None:
        output = run.spectra(model.name, "weights")
        source = run.source_of(model)
        needs = (*trained, run.checkpoint(source)) if source else trained
        found.append(Stage(f"{model.name}: weight spectra", (output,), partial(measuring.weight_spectra, model), needs))
        output = run.spectra(model.name, "features")
        action = partial(measuring.feature_spectra, model)
        found.append(Stage(f"{model.name}: feature spectra", (output,), action, trained))
    return found


@dataclass(frozen=True)
class _Measurement:
    """A measurement on images.

    Attributes:
        run: maps the network, a seed and a progress callback to per-image arrays.
        needs: names of the measurements that it reads.
        sharded: whether the processes of a group take different batches.
    """

    run: Callable[[nn.Module, int, Progress], Arrays]
    needs: tuple[str, ...] = ()
    sharded: bool = True


class _Measuring:
    """Carries out the stages that measure."""

    def __init__(self, run: RunDirectory, inputs: Inputs, networks: Networks, group: ProcessGroup) -> None:
        self.run = run
        self.inputs = inputs
        self.networks = networks
        self.group = group

    @cached_property
    def attacked(self) -> Images:
        size = self.run.settings.evaluation.batch_size
        images = Images(self.inputs.target_attacked, self.networks.device, size)
        return images.shard(self.group.rank, self.group.size)

    @cached_property
    def all_clean(self) -> Images:
        size = self.run.settings.evaluation.batch_size
        return Images(self.inputs.target_clean, self.networks.device, size).shard(self.group.rank, self.group.size)

    @property
    def _compared(self) -> Ball:
        """The ball in which models are compared."""
        s = self.run.settings
        return next(b for b in s.pgd.grid if b[:2] == ("linf", s.rules.compared_linf_255))

    def measurements(self, model: TrainedModel) -> dict[str, _Measurement]:
        """The measurements on images by name, in order; a snapshot has only those that question 4 needs."""
        s = self.run.settings
        if model.epoch is not None:
            some = self.attacked.first(s.evaluation.snapshot_images)
            return {
                "clean-attacked": _Measurement(partial(self._clean, some)),
                pgd_name(*self._compared[:2]): _Measurement(partial(self._pgd, self._compared, some)),
                "smallest-pgd": _Measurement(partial(self._smallest_adversarial, some)),
            }
        found = {
            "clean": _Measurement(partial(self._clean, self.all_clean)),
            "clean-attacked": _Measurement(partial(self._clean, self.attacked)),
        }
        for sigma in s.gaussian.sigmas:
            found[gaussian_name(sigma)] = _Measurement(partial(self._gaussian, sigma))
        for ball in s.pgd.grid:
            found[pgd_name(*ball[:2])] = _Measurement(partial(self._pgd, ball, self.attacked))
        for ball in s.strong.grid:
            found[strong_name(*ball[:2])] = _Measurement(partial(self._strong, ball))
        found["smallest-pgd"] = _Measurement(partial(self._smallest_adversarial, self.attacked))
        found["smallest-gaussian"] = _Measurement(self._smallest_gaussian)
        found["gaussian-of-same-norm"] = _Measurement(partial(self._gaussian_of_norm, model), ("smallest-pgd",))
        found["jacobian"] = _Measurement(self._jacobian)
        found["smoothing"] = _Measurement(self._smoothing)
        found["corruptions"] = _Measurement(self._corruptions, sharded=False)
        if s.transfer.l2:
            found["transfer-images"] = _Measurement(self._transfer_images)
        return found

    def on_images(self, model: TrainedModel, name: str, measurement: _Measurement, progress: Progress) -> str:
        # The seed does not depend on the arm: all arms are measured under the same noise and random starts.
        arrays = measurement.run(self.networks.trained(model), derived_seed(model.seed, name), progress)
        if measurement.sharded:
            arrays = merged(self.group.gather(arrays))
        if self.group.leads:
            write_arrays(self.run.images(model.name, name), arrays)
        return _in_words(arrays)

    def norms(self, model: TrainedModel, progress: Progress) -> str:
        channels, height, width = self.attacked.pixels.shape[1:]
        seed = derived_seed(model.seed, "norms", model.name)
        # The run has one probability of failure, which all models and snapshots share equally.
        eta = self.run.settings.lipschitz.eta / (len(self.run.models) + len(self.run.snapshots))
        measured = layer_norms_and_bound if model.epoch is None else network_bound
        found = measured(self.networks.trained(model), (channels, height, width), eta, seed)
        write_json(self.run.lipschitz(model.name), found)
        return f"upper Lipschitz constant 10^{found['log10_upper']:.2f}"

    def weight_spectra(self, model: TrainedModel, progress: Progress) -> str:
        """Spectra of the weights, and their distance from the network that training began from, where that is known."""
        classes = len(self.inputs.target_attacked.classes)
        start = {} if model.given else self.networks.untrained(model, classes).state_dict()
        arrays = spectra.weights(self.networks.trained(model), start, self.attacked.pixels.shape[1:])
        write_arrays(self.run.spectra(model.name, "weights"), arrays)
        return f"{len(arrays['layer'])} layers"

    def feature_spectra(self, model: TrainedModel, progress: Progress) -> str:
        s, ball = self.run.settings, self._compared
        seed = derived_seed(model.seed, pgd_name(*ball[:2]))
        arrays = spectra.features(self.networks.trained(model), self.attacked.shard(0, 1), ball, s, seed, progress)
        write_arrays(self.run.spectra(model.name, "features"), arrays)
        return f"{len(arrays['stage'])} stages"

    def of_one_seed(self, model: TrainedModel) -> list[TrainedModel]:
        """All models of the seed of ``model``, itself included."""
        return [other for other in self.run.models if other.seed == model.seed]

    def transfer(self, model: TrainedModel, progress: Progress) -> str:
        """What a model makes of the adversarial images of all models of its seed, and of noise of the same norm."""
        s = self.run.settings
        made = _TransferImages(self.run, [other.name for other in self.of_one_seed(model)], self._transferred)
        seed = derived_seed(model.seed, "transfer-images")
        arrays = transfer.judged(self.networks.trained(model), self._transferred, made, s.transfer.l2, seed, progress)
        write_arrays(self.run.images(model.name, "transfer"), arrays)
        return f"{arrays['prediction'].size} adversarial images of {len(made)} models"

    @cached_property
    def _transferred(self) -> Images:
        return self.attacked.shard(0, 1).first(self.run.settings.transfer.images)

    def _transfer_images(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        chosen = self.attacked.first(self.run.settings.transfer.images)
        return transfer.adversarial_images(network, chosen, self.run.settings, seed, progress)

    def _clean(self, images: Images, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return clean_images.clean(network, images, progress)

    def _gaussian(self, sigma: float, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.gaussian(network, self.attacked, sigma, seed, progress)

    def _pgd(self, ball: Ball, images: Images, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.projected_gradient(network, images, ball, self.run.settings, seed, progress)

    def _strong(self, ball: Ball, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return strong_attacks.suite(network, self.attacked, ball, self.run.settings.strong, seed, progress)

    def _smallest_adversarial(self, images: Images, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.smallest_adversarial(network, images, self.run.settings, progress)

    def _smallest_gaussian(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return attacks.smallest_gaussian(network, self.attacked, self.run.settings, seed, progress)

    def _gaussian_of_norm(self, model: TrainedModel, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        l2 = read_measured(self.run.images(model.name, "smallest-pgd"))["l2"]
        return attacks.gaussian_of_norm(network, self.attacked, l2, seed, progress)

    def _jacobian(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return clean_images.jacobian(network, self.attacked, self.run.settings, seed, progress)

    def _smoothing(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        return smoothing.smoothed(network, self.attacked, self.run.settings.smoothing, seed, progress)

    def _corruptions(self, network: nn.Module, seed: int, progress: Progress) -> Arrays:
        s = self.run.settings.corruptions
        chosen = self.attacked.shard(0, 1).first(s.images)
        files, names = self.inputs.corrupted_files, self.inputs.corruption_names
        return corruptions.corrupted(network, chosen, s.severities, files, names, seed, progress)


class _TransferImages(Mapping[str, Arrays]):
    """The adversarial images of models by name, read as they are asked for: those of all would fill the memory."""

    def __init__(self, run: RunDirectory, names: list[str], images: Images) -> None:
        self.run = run
        self.names = names
        self.images = images

    def __getitem__(self, name: str) -> Arrays:
        path = self.run.images(name, "transfer-images")
        found = read_transfer_images(path, len(self.run.settings.transfer.l2))
        shape = found["perturbed"].shape[2:]
        if not np.array_equal(found["label"], self.images.labels.cpu()) or shape != self.images.pixels.shape[1:]:
            raise damaged(path, "its images are not those of this run")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _in_words(arrays: Arrays) -> str:
    if "norm" in arrays:
        return f"Jacobian norm at {len(arrays['norm'])} images, median {float(np.median(arrays['norm'])):.3g}"
    if "found" in arrays:
        # An image that is misclassified as it is needs no perturbation.
        distortion = arrays["distortion"][arrays["found"] & (arrays["distortion"] > 0)]
        middle = f", median distortion x 255 {255 * float(np.median(distortion)):.3g}" if distortion.size else ""
        return f"smallest perturbations of {distortion.size} images{middle}"
    if "perturbed" in arrays:
        return f"{len(arrays['id'])} images at each of {arrays['l2'].shape[1]} norms"
    right = arrays["prediction"] == arrays["label"]
    return f"{int(right.sum())} of {right.size} images classified correctly"
