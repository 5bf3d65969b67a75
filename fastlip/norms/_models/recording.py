"""Run a model once, and record what each of its layers was given and what it returned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlip.norms._models.agreement import Use
from fastlip.norms._models.restore import version_of
from fastlip.norms._operators.batchnorm import BATCHNORMS
from fastlip.norms._operators.modules import CONVS, TRANSPOSED


class LayerCall(NamedTuple):
    """One call of a layer; shapes are without the batch axis."""

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batchnorm: str | None  # the BatchNorm that takes the output


@dataclass
class Recording:
    """What the layers of a model did in one run.

    Attributes:
        calls: calls of layers, in order.
        uses: the same with inputs and outputs, if they were to be kept.
        own_weights: whether every layer ran with the weight that its module holds, if weights were watched.
    """

    calls: list[LayerCall]
    uses: list[Use]
    own_weights: bool


def record_layers(
    model: nn.Module, x: Tensor, *, fold_batchnorm: bool, keep: bool = False, watch: bool = False
) -> Recording:
    """Run the model on x, [B, ...]; with ``keep`` inputs and outputs are copied, with ``watch`` weights compared."""
    recorder = _Recorder(model, fold_batchnorm, keep, watch)
    handles = [
        module.register_forward_hook(recorder.hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (*CONVS, *TRANSPOSED, *BATCHNORMS, nn.Linear))
    ]
    try:
        model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return recorder.recording()


@dataclass
class _Call:
    """A call whose BatchNorm may yet come."""

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output: Tensor
    version: int
    linear: bool
    batchnorm: str | None = None


class _Recorder:
    """Forward hooks, and what they have seen."""

    def __init__(self, model: nn.Module, fold_batchnorm: bool, keep: bool, watch: bool) -> None:
        self._model_name, self._fold_batchnorm, self._keep = type(model).__name__, fold_batchnorm, keep
        self._calls: list[_Call] = []
        self._uses: list[Use] = []
        self._watched = _Weights(model) if watch else None

    def hook(self, name: str) -> Callable[..., None]:
        """The hook of the module of this name."""

        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._keep:
                use = Use(name or self._model_name, module, x.detach().clone(), output.detach().clone())
                self._uses.append(use)
            if self._watched is not None:
                self._watched.compare(module)
            if isinstance(module, BATCHNORMS) and self._fold_batchnorm:
                # Folding takes the very tensor that a layer returned, unchanged since: an in-place ReLU would write it.
                calls = reversed(self._calls)
                source = next((c for c in calls if c.output is x and c.version == version_of(x)), None)
                # Of a linear layer on [B, L, features] a BatchNorm scales L, and not the features.
                fits = source is not None and (x.dim() == 2 or not source.linear)
                if source is not None and fits and source.batchnorm is None:
                    source.batchnorm = name
                    return
            shapes = tuple(x.shape[1:]), tuple(output.shape[1:])
            self._calls.append(_Call(name, *shapes, output, version_of(output), isinstance(module, nn.Linear)))

        return record

    def recording(self) -> Recording:
        """All calls so far."""
        calls = [LayerCall(c.name, c.input_shape, c.output_shape, c.batchnorm) for c in self._calls]
        return Recording(calls, self._uses, self._watched is not None and self._watched.unchanged())


class _Weights:
    """Whether layers run with the weights that they hold, so that models of the same structure run with theirs."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            m: (w, w.data_ptr(), w.detach().clone()) for m in model.modules() if (w := _weight(m)) is not None
        }
        self._same = True
        self._changed: list[Tensor] = []

    def compare(self, module: nn.Module) -> None:
        """Compare the weight that a layer uses now with the one that it held before the run."""
        now = _weight(module)
        weight, address, values = self._before.get(module, (None, 0, None))
        if now is None or values is None or now is not weight or now.data_ptr() != address:
            # The weight was computed or exchanged; a layer without one has nothing to exchange.
            self._same &= getattr(module, "weight", None) is None
        elif now.numel():
            self._changed.append((now.detach() != values).any())

    def unchanged(self) -> bool:
        """Whether all weights were the same; each device is read once."""
        return self._same and not (self._changed and any(torch.stack([c.cpu() for c in self._changed]).tolist()))


def _weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")
