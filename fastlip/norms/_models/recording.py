"""Run a model once, and record the linear maps that it applies, and what it does with its other weights."""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.norms._models.agreement import Use
from fastlip.norms._models.functions import WatchedFunctions
from fastlip.norms._models.held import Factors, HeldTensors, Source, storage_address
from fastlip.norms._models.linear_calls import LinearCall, LinearMap
from fastlip.norms._models.restore import version_of
from fastlip.norms._operators.batchnorm import BATCHNORMS, NO_STATISTICS
from fastlip.norms._operators.modules import CONVS, TRANSPOSED, describe_module, keeps_forward
from fastlip.norms._operators.registry import find_operator

_WEIGHTED = (*CONVS, *TRANSPOSED, nn.Linear)
_ADVICE = "; fastlip.norms.layer_operator takes the map of such a layer"


@dataclass(eq=False)
class LayerCall:
    """One application of a linear map with weights; shapes are without the batch axis.

    Attributes:
        name: qualified name of the layer, or of the tensor that is its weight.
        description: short description of the map.
        covers: the model's tensors that it accounts for.
        input_shape: shape of the input.
        output_shape: shape of the output.
        module: the layer, if it is a module whose class says what it does.
        map: what was computed in place of that; None for factors alone.
        weight: where the map's weight comes from.
        batchnorm: the BatchNorm that takes the output, or that the layer is.
        factors: the factors that multiply the output, or that the layer is.
        used: the weights that the layer ran with, where they are not those that the model held before.
        channels: number of the output's channels.
        channels_last: whether they are on the last axis, and not on the second.
        output: the tensor that was returned, while the model runs, and its version.
    """

    name: str
    description: str
    covers: frozenset[int]
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    module: nn.Module | None = None
    map: LinearMap | None = None
    weight: Source | None = None
    batchnorm: nn.Module | None = None
    factors: Factors | None = None
    used: list[Tensor] = field(default_factory=list)
    channels: int = 0
    channels_last: bool = False
    output: tuple[Tensor, int] | None = None

    @property
    def key(self) -> Hashable:
        """Equal for calls of the same map with the same weight, as long as none is computed."""
        place: Hashable = (self.input_shape, self.output_shape)
        if self.map is not None:
            op = self.map.operator
            place = op.input_size, op.weight.shape, op.stride, op.dilation, op.padding, op.groups, op.padding_mode
        numbers = tuple(None if numbers is None else numbers.key for numbers in (self.weight, self.factors))
        return self.name, self.module, self.map is None or self.map.transposed, place, self.batchnorm, numbers

    @property
    def computed(self) -> list[Tensor]:
        """The numbers that the run computed, or may have."""
        sources = (self.weight, None if self.factors is None else self.factors.source)
        return [*self.used, *(s.computed for s in sources if s is not None and s.computed is not None)]


@dataclass
class Recording:
    """What a model did in one run.

    Attributes:
        calls: calls of layers, in order.
        uses: the same with inputs and outputs, if they were to be kept.
        added: the model's tensors that were added to others.
        left_out: those that were used in ways that have no norm, with the reason.
        foreign: the functions that applied weights that are not made of the model's tensors alone, by name.
        ran: the modules that ran.
        own_weights: whether every layer ran with the weight that its module holds, if weights were watched.
    """

    calls: list[LayerCall]
    uses: list[Use]
    added: set[int]
    left_out: dict[int, str]
    foreign: set[str]
    ran: set[int]
    own_weights: bool


def record_layers(
    model: nn.Module,
    held: HeldTensors,
    x: Tensor,
    *,
    fold_batchnorm: bool,
    keep: bool = False,
    watch: bool = False,
) -> Recording:
    """Run the model on x, [B, ...]; with ``keep`` inputs and outputs are copied, with ``watch`` weights compared."""
    recorder = _Recorder(held, fold_batchnorm, keep, _Weights(model) if watch else None)
    handles = []
    try:
        for module in model.modules():
            kind = _kind_of(module)
            if kind is not None:
                handles.append(module.register_forward_pre_hook(partial(recorder.begin, kind)))
                handles.append(module.register_forward_hook(recorder.end, with_kwargs=True))
            else:
                handles.append(module.register_forward_pre_hook(recorder.runs))
        with WatchedFunctions(held, recorder):
            model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return recorder.recording()


def _kind_of(module: nn.Module) -> str | None:
    """What is known of a module: "registered", "layer", "batchnorm", or "own" for a layer with a forward of its own."""
    if find_operator(module) is not None:
        return "registered"
    cls = next((cls for cls in (*_WEIGHTED, *BATCHNORMS) if isinstance(module, cls)), None)
    if cls is None or not keeps_forward(module, cls):
        # Of a BatchNorm with a forward of its own its functions are seen.
        return "own" if cls in _WEIGHTED else None
    return "batchnorm" if cls in BATCHNORMS else "layer"


@dataclass
class _Frame:
    """A layer that is running, the linear maps that were seen in it, and its weights if they may change."""

    module: nn.Module
    kind: str
    maps: list[tuple[LinearCall, frozenset[int]]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


class _Recorder:
    """Hooks of layers, and a listener to functions."""

    def __init__(self, held: HeldTensors, fold_batchnorm: bool, keep: bool, watched: "_Weights | None") -> None:
        self._held, self._fold_batchnorm, self._keep, self._watched = held, fold_batchnorm, keep, watched
        self._calls: list[LayerCall] = []
        self._uses: list[Use] = []
        self._added: set[int] = set()
        self._left_out: dict[int, str] = {}
        self._foreign: set[str] = set()
        self._ran: set[int] = set()
        self._running: list[_Frame] = []

    def runs(self, module: nn.Module, args: Any) -> None:
        """A module runs."""
        self._ran.add(id(module))

    def begin(self, kind: str, module: nn.Module, args: Any) -> None:
        """A layer begins."""
        self.runs(module, args)
        self._running.append(_Frame(module, kind))

    def end(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer has run."""
        if self._watched is not None:
            self._watched.compare(module)  # while the layer is running, so that it is not seen as a part of the model
        while (frame := self._running.pop()).module is not module:
            pass
        if any(outer.kind == "registered" for outer in self._running):
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        name, covers = self._held.module_name(module), frozenset(self._held.below(module))
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            self.leaves_out(covers, f"{type(module).__name__} takes or returns something else than one tensor")
            return
        if output.is_complex():
            self.leaves_out(covers, f"{type(module).__name__} computes with complex numbers, which have no norms here")
            return
        if frame.kind == "own":
            self._end_own(frame, name, covers, x, output)
            return
        if frame.kind == "batchnorm":
            if module.running_var is None:
                self.leaves_out(covers, NO_STATISTICS)
                return
            self._keep_use(name, module, x, output)
            self._scale(name, self.output_of(x), x, output, covers, batchnorm=module)
            return
        self._keep_use(name, module, x, output)
        linear = isinstance(module, nn.Linear)
        shapes = ((x.shape[-1],), (output.shape[-1],)) if linear else (tuple(x.shape[1:]), tuple(output.shape[1:]))
        description = type(module).__name__ if frame.kind == "registered" else describe_module(module, shapes[0])
        weight = Source(self._held.place(module), "weight") if frame.kind == "layer" else None
        call = LayerCall(name, description, covers, *shapes, module=module, weight=weight, used=frame.weights)
        self._add(call, output, linear)

    def _end_own(self, frame: _Frame, name: str, covers: frozenset[int], x: Tensor, output: Tensor) -> None:
        module = frame.module
        kind = next(cls for cls in _WEIGHTED if isinstance(module, cls)).__name__
        if len(frame.maps) != 1:
            seen = f"{len(frame.maps)} linear maps of weights are" if frame.maps else "no linear map of a weight is"
            self.leaves_out(
                covers, f"{type(module).__name__} has another forward than {kind}, in which {seen} seen{_ADVICE}"
            )
            return
        ((call, tensors),) = frame.maps
        if self._keep:
            use = Use(name, module, x.detach().clone(), output.detach().clone(), call.map, own=True)
            self._uses.append(use)
        source = self._held.source(tensors, call.map.operator.weight)
        self._linear(name, call, source, output, covers, type(module).__name__)

    # What functions do.

    def silent(self) -> bool:
        """Whether the layer that runs does what its class says, or what was registered for it."""
        return any(frame.kind == "registered" for frame in self._running) or (
            bool(self._running) and self._running[-1].kind != "own"
        )

    def has_weight(self, weight: Tensor) -> None:
        """The layer that runs has a weight that may be another in the next run."""
        if self._running:
            self._running[-1].weights.append(weight.detach().clone())

    def output_of(self, x: Tensor) -> LayerCall | None:
        """The call that returned this very tensor, unchanged since: an in-place ReLU would write it."""
        now = version_of(x)
        found = (c for c in reversed(self._calls) if c.output and c.output[0] is x and c.output[1] == now)
        return next(found, None)

    def linear(self, call: LinearCall, tensors: frozenset[int], label: str = "") -> None:
        """A linear map was applied, whose weight is computed from these tensors."""
        if self._running:
            self._running[-1].maps.append((call, tensors))
            return
        if call.x.numel() and not storage_address(call.x):
            self.leaves_out(tensors, f"{call.map.name} is called on a tensor of a transform of torch.func")
            return
        source = self._held.source(tensors, call.map.operator.weight)
        if source.rows is not None and not label:
            label = "[{}:{}]".format(*source.rows)
        name = self._held.layer_name(tensors) + label
        if self._keep and call.y is not call.x:
            self._uses.append(Use(name, None, call.x.detach().clone(), call.y.detach().clone(), call.map))
        self._linear(name, call, source, call.y if call.whole else None, tensors, call.map.name)

    def scales(
        self,
        x: Tensor,
        y: Tensor,
        before: LayerCall | None,
        tensors: frozenset[int],
        factors: Factors | nn.Module,
        batchnorm: bool,
    ) -> None:
        """Channels were multiplied by factors, or by those of a BatchNorm, computed from these tensors."""
        if self._running:
            return
        name = self._held.layer_name(tensors)
        if isinstance(factors, nn.Module):
            tensors |= self._held.below(factors)
            name = self._held.module_name(factors)
            self._scale(name, before, x, y, tensors, batchnorm=factors)
            return
        fits = before is not None and factors.along(1 if x.dim() > 2 else -1, x.dim(), before.channels)
        self._scale(name, before if batchnorm and fits else None, x, y, tensors, factors=factors)

    def adds(self, tensors: Collection[int]) -> None:
        """These tensors were added."""
        self._added.update(tensors)

    def leaves_out(self, tensors: Collection[int], reason: str) -> None:
        """These tensors were used in another way."""
        if not self._running:
            for tensor in tensors:
                self._left_out.setdefault(tensor, reason)

    def leaves_out_weight_of(self, name: str) -> None:
        """A function that takes a weight was given one that is not made of the model's tensors alone."""
        self._foreign.add(name)

    def _linear(
        self, name: str, call: LinearCall, source: Source, output: Tensor | None, covers: frozenset[int], text: str
    ) -> None:
        last = not call.map.operator.kernel
        description = call.map.describe(text)
        added = LayerCall(name, description, covers, map=call.map, weight=source, channels_last=last)
        self._add(added, output, last)

    def _scale(
        self,
        name: str,
        before: LayerCall | None,
        x: Tensor,
        y: Tensor,
        covers: frozenset[int],
        batchnorm: nn.Module | None = None,
        factors: Factors | None = None,
    ) -> None:
        # Of a linear layer on [B, L, features] a BatchNorm scales L, and not the features.
        fits = before is not None and (x.dim() == 2 or not before.channels_last)
        if before is not None and fits and self._fold_batchnorm and before.batchnorm is None and before.factors is None:
            before.batchnorm, before.factors = batchnorm, factors
            before.covers |= covers
            return
        shape = tuple(x.shape[1:])
        if batchnorm is not None:
            description = describe_module(batchnorm, shape)
        else:
            assert factors is not None
            shape = tuple(factors.shape)
            description = f"factors {torch.Size(shape).numel()}"
        call = LayerCall(name, description, covers, shape, shape, batchnorm=batchnorm, factors=factors)
        self._add(call, y, False)

    def _add(self, call: LayerCall, output: Tensor | None, channels_last: bool) -> None:
        if output is not None:
            call.output = output, version_of(output)
            call.channels_last, call.channels = channels_last, output.shape[-1 if channels_last else 1]
        self._calls.append(call)

    def _keep_use(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if self._keep:
            self._uses.append(Use(name, module, x.detach().clone(), output.detach().clone()))

    def recording(self) -> Recording:
        """All that was seen."""
        for call in self._calls:
            call.output = None
        own = self._watched is not None and self._watched.unchanged()
        return Recording(self._calls, self._uses, self._added, self._left_out, self._foreign, self._ran, own)


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
