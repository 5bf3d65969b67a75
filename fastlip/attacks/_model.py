"""The forward pass of a model under attack, which leaves the model as it was."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.attacks._arguments import check_model, count, flag, number, shown
from fastlip.attacks._counts import report, report_replayed
from fastlip.attacks._graphs import IterationGraphs
from fastlip.attacks._outputs import logits_in
from fastlip.norms._models.restore import version_of

Model = Callable[[Tensor], Tensor]


class Network:
    """A model, whose decisions count, and a faster copy of it, whose gradients are followed; from :func:`prepare`.

    Calling the network calls the model itself, so that a network can take the place of a model anywhere.

    As images fall, attacks go on with fewer. A model that fails on a smaller batch than before, or loses the batch axis
    with it, is given batches of the largest size from then on, and so is a model from ``torch.compile``, which would be
    compiled for each size anew; what fills them counts for nothing.

    Args:
        model: maps inputs to logits [B, C].
        faster: the copy; None follows the model's own gradients.
        rounding: the largest difference to be expected between their logits, relative to the spread of an image's
            logits. Where it cannot change a decision the model is not asked.
        graphs: what replays whole iterations of an attack on a GPU; None carries them out one operator at a time.
        draws: passes whose mean probabilities decide, for a model with random outputs.
        eot: passes whose mean probabilities are followed by gradients (expectation over transformation).
        same_size: give the model batches of the largest size so far; where it turns out to be necessary if None.

    Attributes:
        exact: whether the gradients are those of what decides.
        may_keep: whether what is followed may keep its input, as a model may, and a traced copy does not.
        largest: the size of the largest batch so far.
        graphs: the CUDA graphs of attacks on this network, where :func:`prepare` made it fast on a GPU. At most 32 are
            alive, in at most half of the device's memory; ``graphs.alive`` and ``graphs.bytes`` say what there is now,
            and ``graphs.clear()`` frees it.

    Raises:
        TypeError: a type is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> network = attacks.Network(model, draws=4, eot=2)  # or what prepare makes
        >>> adversarial = attacks.pgd(network, images, labels, eps=8 / 255)
    """

    def __init__(
        self,
        model: Model,
        faster: Model | None = None,
        rounding: float = math.inf,
        *,
        graphs: IterationGraphs | None = None,
        draws: int = 1,
        eot: int = 1,
        same_size: bool | None = None,
    ) -> None:
        check_model(model)
        if faster is not None and not callable(faster):
            raise TypeError(f"faster must map inputs to logits [B, C] or be None, got {shown(faster)}")
        if not isinstance(graphs, IterationGraphs | None):
            raise TypeError(f"graphs must be IterationGraphs or None, got {shown(graphs)}")
        self.model = model
        self.draws, self.eot = count(draws, "draws", 1), count(eot, "eot", 1)
        self.follow(faster, number(rounding, "rounding"), graphs)
        self.same_size = is_compiled(model) if same_size is None else flag(same_size, "same_size")
        self.largest = 0

    def follow(self, faster: Model | None, rounding: float, graphs: IterationGraphs | None) -> None:
        """Follow the gradients of another copy, or the model's own; arguments as for the class."""
        self.faster, self.graphs = faster, graphs
        # Averages of different draws differ by more than any rounding.
        one_pass = self.draws == self.eot == 1
        self.exact = faster is None and one_pass
        self.may_keep = not getattr(faster, "keeps_nothing", False)
        self.rounding = rounding if one_pass else math.inf

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def judge(
        self,
        inputs: Tensor,  # [B, ...]
    ) -> Tensor:
        """Logits [B, C] of the model itself; with several draws, the logarithm of their mean probabilities."""
        if self.draws == 1:
            return self._logits(self.model, inputs)
        return _mean_prediction([self._logits(self.model, inputs) for _ in range(self.draws)])

    def ascend(
        self,
        inputs: Tensor,  # [B, ...]
        *,
        counted: bool = True,
    ) -> Tensor:
        """Logits [B, C] whose gradients are followed; unless ``counted`` no count of passes hears of a copy's."""
        if self.exact:
            return self._logits(self.model, inputs)
        if self.eot == 1:
            return self._followed(inputs, counted)
        return _mean_prediction([self._followed(inputs, counted) for _ in range(self.eot)])

    def _followed(self, inputs: Tensor, counted: bool) -> Tensor:
        if self.faster is None:
            return self._logits(self.model, inputs)
        logits = self._logits(self.faster, inputs)
        if counted:
            report(self.model, logits)
        return logits

    def _logits(self, model: Model, inputs: Tensor) -> Tensor:
        """:func:`logits_of`, on a batch of the largest size so far where a smaller one is not to be had."""
        size = len(inputs)
        if self.same_size and size < self.largest:
            return logits_of(model, _filled(inputs, self.largest))[:size]
        try:
            logits = logits_of(model, inputs)
        except Exception:  # a model may raise anything at a size that it was not made for
            # A single image may have lost its batch axis to a squeeze.
            room = max(self.largest, 2)
            padded = _logits_in_room(model, inputs, room) if 0 < size < room else None
            if padded is None:
                raise
            self.same_size, self.largest = True, room
            return padded
        self.largest = max(self.largest, size)
        return logits

    def count_replayed(self, images: int) -> None:
        """Tell the counts in progress of a replayed iteration, whose passes nothing else sees."""
        report_replayed(self.model, images)


def _logits_in_room(model: Model, inputs: Tensor, room: int) -> Tensor | None:
    """The logits of ``inputs`` in a larger batch; None where the model fails on that."""
    try:
        return logits_of(model, _filled(inputs, room))[: len(inputs)]
    except Exception:  # a model may raise anything
        return None


def _filled(inputs: Tensor, size: int) -> Tensor:
    """``inputs`` followed by copies of the first one, [size, ...]."""
    return torch.cat([inputs, inputs[:1].detach().expand(size - len(inputs), *inputs.shape[1:])])


def _mean_prediction(
    draws: list[Tensor],  # each [B, C]
) -> Tensor:
    """The logarithm of the mean of the predicted probabilities, [B, C]; -inf, without a gradient, where all are 0."""
    logarithms = torch.stack(draws).log_softmax(2)
    excluded = (logarithms == -torch.inf).all(0)
    mean = logarithms.masked_fill(excluded, 0.0).logsumexp(0) - math.log(len(draws))
    return mean.masked_fill(excluded, -torch.inf)


@contextmanager
def eval_mode(network: Network) -> Iterator[Network]:
    """The network in eval mode with gradients available, whatever mode the caller is in; modes are restored afterwards.

    Modes are kept for each module, because a network may be partly frozen, and are restored whatever happened to them
    in between.
    """
    model = network.model
    # A frozen TorchScript module has no mode.
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")] if isinstance(model, nn.Module) else []
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


def is_compiled(model: Model) -> bool:
    """Whether ``torch.compile`` has a part in the model, which makes each size of a batch expensive."""
    if not isinstance(model, nn.Module):
        return hasattr(model, "_torchdynamo_orig_callable")
    for module in model.modules():  # looked up in their dicts: a module's __getattr__ is slow where there is nothing
        held = vars(module)
        if held.get("_compiled_call_impl") is not None or "_orig_mod" in (held.get("_modules") or ()):
            return True
    return False


def logits_of(
    model: Model,
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """The model's logits [B, C] in float32 at least; what it returns may hold them as :func:`logits_in` says."""
    version = version_of(inputs)
    try:
        returned = model(inputs)
    except AssertionError as error:  # as vision transformers check the size of images
        raise ValueError(f"model does not run on inputs of shape {list(inputs.shape)}: {error}") from error
    logits = logits_in(returned, len(inputs))
    if version_of(inputs) != version:
        raise ValueError("model must not change its input in place: what is attacked would change with it")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != inputs.shape[0]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [B, C] with B = {inputs.shape[0]}, got {got}")
    if logits.shape[1] < 2:
        raise ValueError(f"model must return logits of at least 2 classes, got {logits.shape[1]}")
    return logits if logits.dtype == torch.float64 else logits.float()


class NotDifferentiable(ValueError):
    """The model's output does not depend differentiably on its input."""


def input_gradient(
    logits: Tensor,  # [B, C]
    inputs: Tensor,  # [B, ...]
    grad: Tensor,  # [B, C]
) -> Tensor:
    """The gradient of logits * grad with respect to ``inputs``, [B, ...].

    Raises:
        NotDifferentiable: there is none, though the logits may depend on weights that want a gradient.
    """
    found: Tensor | None = None
    if logits.requires_grad:
        (found,) = torch.autograd.grad(logits, inputs, grad, allow_unused=True)
    if found is None:
        raise NotDifferentiable("model's output must depend differentiably on its input for a gradient attack")
    return found
