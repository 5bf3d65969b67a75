"""The forward pass of a model under attack, which leaves the model as it was."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.attacks._arguments import check_model, number, shown
from fastlip.attacks._counts import report, report_replayed
from fastlip.attacks._graphs import IterationGraphs

Model = Callable[[Tensor], Tensor]


class Network:
    """A model, whose decisions count, and a faster copy of it, whose gradients are followed; from :func:`prepare`.

    Calling the network calls the model itself, so that a network can take the place of a model anywhere.

    Args:
        model: maps inputs to logits [B, C].
        faster: the copy; None follows the model's own gradients.
        rounding: the largest difference to be expected between their logits, relative to the spread of an image's
            logits. Where it cannot change a decision the model is not asked.
        graphs: what replays whole iterations of an attack on a GPU; None carries them out one operator at a time.

    Attributes:
        exact: whether the gradients are those of the model itself.
        graphs: the CUDA graphs of attacks on this network, where :func:`prepare` made it fast on a GPU. At most 32 are
            alive, in at most half of the device's memory; ``graphs.alive`` and ``graphs.bytes`` say what there is now,
            and ``graphs.clear()`` frees it.

    Raises:
        TypeError: a type is wrong.
    """

    def __init__(
        self,
        model: Model,
        faster: Model | None = None,
        rounding: float = math.inf,
        *,
        graphs: IterationGraphs | None = None,
    ) -> None:
        check_model(model)
        if faster is not None and not callable(faster):
            raise TypeError(f"faster must map inputs to logits [B, C] or be None, got {shown(faster)}")
        if not isinstance(graphs, IterationGraphs | None):
            raise TypeError(f"graphs must be IterationGraphs or None, got {shown(graphs)}")
        self.model = model
        self.faster = faster
        self.exact = faster is None
        self.rounding = number(rounding, "rounding")
        self.graphs = graphs

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def judge(
        self,
        inputs: Tensor,  # [B, ...]
    ) -> Tensor:
        """Logits [B, C] of the model itself."""
        return logits_of(self.model, inputs)

    def ascend(
        self,
        inputs: Tensor,  # [B, ...]
        *,
        counted: bool = True,
    ) -> Tensor:
        """Logits [B, C] whose gradients are followed; unless ``counted`` no count of passes hears of a copy's."""
        if self.faster is None:
            return logits_of(self.model, inputs)
        logits = logits_of(self.faster, inputs)
        if counted:
            report(self.model, logits)
        return logits

    def count_replayed(self, images: int) -> None:
        """Tell the counts in progress of a replayed iteration, whose passes nothing else sees."""
        report_replayed(self.model, images)


@contextmanager
def eval_mode(network: Network) -> Iterator[Network]:
    """The network in eval mode with gradients available, whatever mode the caller is in; modes are restored afterwards.

    Modes are kept for each module, because a network may be partly frozen, and are restored whatever happened to them
    in between.
    """
    model = network.model
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, training in modes:
            if training:
                module.training = False
        with torch.inference_mode(False), torch.enable_grad():
            yield network
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


def unwrapped(model: Model) -> Model:
    """The module inside a DistributedDataParallel, or the model itself.

    The wrapper's forward pass broadcasts buffers: processes that take different numbers of steps would wait forever.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def _version(t: Tensor) -> int:
    """The number of in-place changes to a tensor; 0 for inference tensors, whose changes are not counted."""
    return 0 if t.is_inference() else t._version


def logits_of(
    model: Model,
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """The model's logits [B, C] in float32 at least."""
    version = _version(inputs)
    logits = model(inputs)
    if _version(inputs) != version:
        raise ValueError("model must not change its input in place: what is attacked would change with it")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != inputs.shape[0]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [B, C] with B = {inputs.shape[0]}, got {got}")
    if logits.shape[1] < 2:
        raise ValueError(f"model must return logits of at least 2 classes, got {logits.shape[1]}")
    return logits if logits.dtype == torch.float64 else logits.float()
