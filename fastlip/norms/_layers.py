"""The norms of all layers of a model."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.norms._interval import NormInterval
from fastlip.norms._modules import (
    BATCHNORMS,
    CONVS,
    NO_STATISTICS,
    TRANSPOSED,
    batchnorm_scales,
    describe_module,
    diagonal_norms,
    module_operator,
    require_finite_scale,
    scaled,
)
from fastlip.norms._operator import Operator, look_at, require_finite
from fastlip.norms._report import NormReport
from fastlip.norms._solve import Settings, memory_for, operator_norms
from fastlip.norms._structure import Remembered, modules_of


@dataclass
class _Call:
    """One layer at work: what it is, on what shape, and which BatchNorm follows it."""

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output: Tensor
    version: int
    linear: bool
    batchnorm: str | None = None


@dataclass(frozen=True)
class _Slot:
    """A layer of any model of one structure; modules are named by their place in :func:`modules_of`.

    Attributes:
        name: as in :class:`_Layer`.
        description: likewise.
        module: whose weight it is.
        geometry: its linear map, with a weight that holds no numbers; None for a BatchNorm alone.
        batchnorm: the BatchNorm that is folded into it, or that it is.
        transposed: whether the map is the adjoint's, so that output channels are the weight's second axis.
    """

    name: str
    description: str
    module: int
    geometry: Operator | None
    batchnorm: int | None
    transposed: bool = False


@dataclass(frozen=True)
class _Layer:
    """A layer of a model.

    Attributes:
        name: its own, with a number where it ran on several shapes.
        description: for the report.
        operator: its linear map; None for a BatchNorm alone.
        scale: factors of the BatchNorm that is folded into it, or that it is.
    """

    name: str
    description: str
    operator: Operator | None
    scale: Tensor | None


@overload
def layer_norms(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = ...,
    rtol: float = ...,
    confidence: float = ...,
    method: str = ...,
    generator: torch.Generator | None = ...,
    starts: int = ...,
    max_steps: int | None = ...,
    dtype: torch.dtype = ...,
    max_memory: int | None = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> NormReport: ...
@overload
def layer_norms(
    model: Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = ...,
    rtol: float = ...,
    confidence: float = ...,
    method: str = ...,
    generator: torch.Generator | None = ...,
    starts: int = ...,
    max_steps: int | None = ...,
    dtype: torch.dtype = ...,
    max_memory: int | None = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> list[NormReport]: ...
def layer_norms(
    model: nn.Module | Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = True,
    rtol: float = 1e-2,
    confidence: float = 1.0 - 1e-6,
    method: str = "auto",
    generator: torch.Generator | None = None,
    starts: int = 4,
    max_steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NormReport | list[NormReport]:
    """Norm intervals of every convolution and linear layer of a model, on the input sizes they really have.

    The model runs once on a zero input, in eval mode, to learn those sizes. Models of the same classes, attributes and
    tensor shapes, such as checkpoints of one model, are taken to run alike: one of them runs, and none in later calls.
    Layers that did not run are left out; one that ran on several sizes, or in front of several BatchNorms, appears once
    for each. BatchNorm that stands alone appears as its factor max |gamma| / sqrt(var + eps). Weights in other hands
    are not seen: those of functional calls, and of modules that apply them by themselves, such as
    ``nn.MultiheadAttention``.

    Args:
        model: the model, in any mode, dtype and on any device; it is left as it was. Or several models, whose layers of
            equal shape are iterated together. Layers have the names that they have inside DataParallel or what
            ``torch.compile`` made.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        fold_batchnorm: multiply a BatchNorm into the layer whose output it takes, before the norm.
        rtol: relative width at which iteration stops.
        confidence: probability that all upper sides hold, over all layers of all models in the call.
        method: see :func:`conv_norm`.
        generator: source of the starts; by default one seeded by the operating system.
        starts: see :func:`conv_norm`.
        max_steps: see :func:`conv_norm`.
        dtype: see :func:`conv_norm`.
        max_memory: see :func:`conv_norm`.
        progress: called with the number of layers done and their total, each time one is.

    Returns:
        A report, or a list of them, one per model.

    Raises:
        TypeError: a model is no module.
        ValueError: an argument is wrong, a model does not run on such inputs, or it is unknown what a layer applies, or
            its weight holds NaN or infinite values; the message names the layer.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    models = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    bare = [bare_model(m) for m in models]
    memory = memory_for(max_memory, (t for m in bare for t in m.parameters()))
    settings = Settings(rtol, confidence, method, starts, max_steps, dtype, memory, generator, progress)
    collected = _collect(bare, checked_shape(input_shape), fold_batchnorm)
    every = [layer for layers in collected for layer in layers]
    operators = [layer.operator for layer in every if layer.operator is not None]
    look_at(operators)
    alone = diagonal_norms([layer.scale for layer in every if layer.operator is None and layer.scale is not None])
    factors = iter(alone)
    for layer in every:
        norm = layer.operator.frobenius if layer.operator else next(factors)
        if not math.isfinite(norm):
            _require_finite(layer)
    solved, factors = iter(operator_norms(operators, settings)), iter(alone)
    reports = []
    for layers in collected:
        intervals = {layer.name: next(solved) if layer.operator else _exactly(next(factors)) for layer in layers}
        random = any(interval.confidence < 1.0 for interval in intervals.values())
        reports.append(
            NormReport(
                intervals,
                {layer.name: layer.description for layer in layers},
                confidence if random else 1.0,
                generator.initial_seed() if random else None,
            )
        )
    return reports[0] if isinstance(model, nn.Module) else reports


def _exactly(norm: float) -> NormInterval:
    return NormInterval(norm * (1 - 2e-14), norm, 1.0, "closed form", 0, True)


def _plan(model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool) -> list[_Slot]:
    """What is to be known of the layers that run, in order, but for their numbers."""
    modules = dict(model.named_modules())
    index = {id(module): i for i, module in enumerate(modules_of(model))}
    calls = dict.fromkeys(_record(model, input_shape, fold_batchnorm))  # each once
    for name, *_, batchnorm in calls:
        user = batchnorm or (name if isinstance(modules[name], BATCHNORMS) else None)
        if user is not None and modules[user].running_var is None:
            raise ValueError(f"layer {_shown(name, modules)}: {NO_STATISTICS}")
    found: list[_Slot] = []
    repeats: Counter[str] = Counter()
    for name, shape, output_shape, batchnorm in calls:
        module, shown = modules[name], _shown(name, modules)
        repeats[name] += 1
        if repeats[name] > 1:
            shown += f"#{repeats[name]}"
        description = describe_module(module, shape)
        place = index[id(module)]
        if isinstance(module, BATCHNORMS):
            found.append(_Slot(shown, description, place, None, place))
            continue
        if batchnorm is not None:
            description += " + BN"
        try:
            size = output_shape[1:] if isinstance(module, TRANSPOSED) else None
            operator = module_operator(module, shape, output_size=size, finite=False)
        except ValueError as error:
            raise ValueError(f"layer {shown}: {error}") from None
        geometry = operator.with_weight(operator.weight.new_empty(operator.weight.shape, device="meta"))
        follower = None if batchnorm is None else index[id(modules[batchnorm])]
        found.append(_Slot(shown, description, place, geometry, follower, isinstance(module, TRANSPOSED)))
    return found


#: Checkpoints of one model run alike: only the first of them runs, and is looked at layer by layer.
_planned = Remembered(_plan)


def _collect(models: Sequence[nn.Module], input_shape: tuple[int, ...], fold_batchnorm: bool) -> list[list[_Layer]]:
    """The layers of each model that run, in order; nothing is read from the device of their weights."""
    plans = [_planned(model, input_shape, fold_batchnorm) for model in models]
    modules = [modules_of(model) for model in models]
    batchnorms = {
        id(held[slot.batchnorm]): held[slot.batchnorm]
        for slots, held in zip(plans, modules, strict=True)
        for slot in slots
        if slot.batchnorm is not None
    }
    scales = dict(zip(batchnorms, batchnorm_scales(list(batchnorms.values())), strict=True))
    weights = _weights(plans, modules, scales)
    found = []
    for slots, held in zip(plans, modules, strict=True):
        layers = []
        for slot in slots:
            scale = None if slot.batchnorm is None else scales[id(held[slot.batchnorm])]
            operator = None if slot.geometry is None else slot.geometry.with_weight(next(weights))
            layers.append(_Layer(slot.name, slot.description, operator, scale))
        found.append(layers)
    return found


def _weights(
    plans: Sequence[list[_Slot]], modules: Sequence[list[nn.Module]], scales: dict[int, Tensor]
) -> Iterator[Tensor]:
    """The weights of all layers with the factors of the BatchNorms that follow, in order."""
    found: list[Tensor] = []
    alike: dict[tuple[object, ...], list[tuple[int, Tensor, _Slot]]] = defaultdict(list)
    for slots, held in zip(plans, modules, strict=True):
        for slot in slots:
            if slot.geometry is None:
                continue
            weight: Tensor = held[slot.module].weight.detach()  # type: ignore[operator]
            if slot.batchnorm is not None:
                scale = scales[id(held[slot.batchnorm])]
                if _launches_cost(weight.device):
                    alike[id(slot), weight.dtype, weight.device].append((len(found), scale, slot))
                else:
                    weight = _folded(weight, scale, slot)
            found.append(weight)
    for group in alike.values():  # a layer of all models at once
        places, factors, (slot, *_) = zip(*group, strict=True)
        together = _folded(torch.cat([found[i] for i in places]), torch.cat(factors), slot, len(group))
        for i, part in zip(places, together.chunk(len(group)), strict=True):
            found[i] = part
    return iter(found)


def _folded(weight: Tensor, scale: Tensor, slot: _Slot, count: int = 1) -> Tensor:
    """A layer's weights in ``count`` models, one after the other, times their BatchNorms' factors."""
    assert slot.geometry is not None
    first, second = (None, scale) if slot.transposed else (scale, None)
    return scaled(weight, first, second, count * slot.geometry.groups)


def _launches_cost(device: torch.device) -> bool:
    """Whether one operation on joined memory takes less time than several on its parts."""
    return device.type == "cuda"


def _shown(name: str, modules: dict[str, nn.Module]) -> str:
    return name or type(modules[name]).__name__


def _require_finite(layer: _Layer) -> None:
    """Raise ValueError where factors or weight are not finite; a finite weight's norm may overflow."""
    try:
        if layer.scale is not None:
            require_finite_scale(layer.scale)
        if layer.operator is not None:
            require_finite(layer.operator)
    except ValueError as error:
        raise ValueError(f"layer {layer.name}: {error}") from None


#: A layer's name, the shapes of its input and output without the batch axis, and the BatchNorm that takes its output.
_Ran = tuple[str, tuple[int, ...], tuple[int, ...], str | None]


def _record(model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool) -> list[_Ran]:
    """Run the model once and record what its layers were given, in order."""
    calls: list[_Call] = []
    handles = []

    def hook(name: str, module: nn.Module) -> None:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(module, BATCHNORMS) and fold_batchnorm:
                # The very tensor a layer returned, and not written to since, as an in-place ReLU would.
                source = next((c for c in reversed(calls) if c.output is x and c.version == x._version), None)
                # Of a linear layer on [B, L, features] it scales L, and not the features.
                fits = source is not None and (x.dim() == 2 or not source.linear)
                if source is not None and fits and source.batchnorm is None:
                    source.batchnorm = name
                    return
            shapes = tuple(x.shape[1:]), tuple(output.shape[1:])
            calls.append(_Call(name, *shapes, output, output._version, isinstance(module, nn.Linear)))

        handles.append(module.register_forward_hook(record, with_kwargs=True))

    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, *TRANSPOSED, *BATCHNORMS, nn.Linear)):
            hook(name, module)
    try:
        with eval_mode(model), torch.no_grad(), runs_on(model, input_shape):
            model(example_input(model, input_shape))
    finally:
        for handle in handles:
            handle.remove()
    return [(call.name, call.input_shape, call.output_shape, call.batchnorm) for call in calls]


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple.

    Raises:
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape must be positive integers without the batch axis, got {input_shape!r}")
    return shape


def example_input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """A zero input, [1, *input_shape], in the dtype and on the device of the model's first parameter or buffer.

    Raises:
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    shape = checked_shape(input_shape)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return torch.zeros(1, *shape, dtype=tensor.dtype, device=tensor.device)
    return torch.zeros(1, *shape)


def bare_model(model: nn.Module) -> nn.Module:
    """What a data-parallel wrapper or ``torch.compile`` holds, or the model itself.

    Raises:
        TypeError: it is no module.
        ValueError: part of it is TorchScript.
    """
    _check_module(model)
    inner = model.module if isinstance(model, (nn.DataParallel, DistributedDataParallel)) else model
    inner = getattr(inner, "_orig_mod", inner)
    if inner is not model:
        return bare_model(inner)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f" (at {name})" if name else ""
            raise ValueError(f"model holds TorchScript{where}, which cannot be looked into; give what it was made of")
    return model


@contextmanager
def runs_on(model: nn.Module, input_shape: Sequence[int]) -> Iterator[None]:
    """Errors of torch in a forward pass as ones that say what the model was given."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        name = type(model).__name__
        raise ValueError(
            f"{name} does not run on an input of shape {list(input_shape)}, without the batch axis: {error}"
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, outside of ``torch.inference_mode``; every module's own mode is restored afterwards.

    Raises:
        TypeError: it is no module.
    """
    _check_module(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
