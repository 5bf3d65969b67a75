"""The networks of a run: initial ones, and trained ones from their checkpoints."""

from pathlib import Path

import torch
from torch import nn

from fastlip.models import Anatomy, load_backbone, load_checkpoint
from fastlip.study.errors import StudyError
from fastlip.study.measure import network_parts
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stage import derived_seed
from fastlip.study.settings.training import TRANSFER
from fastlip.study.storage.files import AGAIN, damaged
from fastlip.study.storage.run_directory import RunDirectory, TrainedModel
from fastlip.study.training.architectures import build, parts


class Networks:
    """Builds and loads the networks of a run; the last trained network is kept in memory."""

    def __init__(self, run: RunDirectory, inputs: Inputs, device: torch.device) -> None:
        self.run = run
        self.inputs = inputs
        self.device = device
        self._loaded: tuple[str, nn.Module] | None = None

    def untrained(self, model: TrainedModel, classes: int) -> nn.Sequential:
        """The network that the training of ``model`` starts from, on the CPU: random, or with the source's backbone.

        Raises:
            StudyError: the run's own checkpoint of the source is damaged.
        """
        network = build(self.run.settings, model.arm, classes, derived_seed(model.seed, "weights"))
        if model.arm in TRANSFER:
            source = self.run.source_of(model)
            weights = weights_at(self.run.checkpoint(source)) if source else self.inputs.source_weights()
            try:
                load_backbone(network, weights, self.parts(model, network).head)
            except ValueError as error:
                # Weights given on the command line were checked before anything began.
                raise damaged(self.run.checkpoint(source or "source"), error) from None
        return network

    def trained(self, model: TrainedModel) -> nn.Module:
        """The trained network from its checkpoint: on the run's device, in evaluation mode, without gradients.

        Raises:
            StudyError: the checkpoint is damaged or holds another network.
        """
        if self._loaded is None or self._loaded[0] != model.name:
            network = build(self.run.settings, model.arm, len(self.inputs.target_attacked.classes), 0)
            load_into(network, self.run.checkpoint(model.name), model)
            network_parts.give(network, self.parts(model, network))
            network = network.to(self.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
            self._loaded = (model.name, network)
        return self._loaded[1]

    def parts(self, model: TrainedModel, network: nn.Module) -> Anatomy:
        """The stages and the head of the network of ``model``."""
        return parts(self.run.settings, model.arm, network)


def load_into(network: nn.Module, path: Path, model: TrainedModel) -> None:
    """Load the run's own checkpoint at ``path``, which the training of ``model`` wrote, into ``network``.

    Raises:
        StudyError: it is damaged or holds another network.
    """
    try:
        network.load_state_dict(weights_at(path))
    except RuntimeError:
        raise StudyError(f"{path} holds another network; delete it to train {model.name} again") from None


def weights_at(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one of the run's own checkpoints.

    Raises:
        StudyError: the checkpoint is damaged.
    """
    try:
        return load_checkpoint(path)[0]
    except ValueError as error:
        raise StudyError(f"{error}; {AGAIN}") from None
