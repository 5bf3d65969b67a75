"""The norms of all layers of a model."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import overload

import torch
from torch import Tensor, nn

from fastlip.norms._interval import NormInterval
from fastlip.norms._models.agreement import Use, require_agreement
from fastlip.norms._models.eval_mode import eval_mode, require_eval
from fastlip.norms._models.inputs import checked_shape, example_input, random_inputs, runs_on
from fastlip.norms._models.restore import version_of
from fastlip.norms._models.structure import modules_of, structure
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._operators.batchnorm import (
    BATCHNORMS,
    NO_STATISTICS,
    batchnorm_scales,
    diagonal_norms,
    require_finite_scale,
)
from fastlip.norms._operators.modules import CONVS, TRANSPOSED, describe_module, keeps_forward, module_operator, scaled
from fastlip.norms._operators.operator import Operator, compute_frobenius, require_finite
from fastlip.norms._report.report import NormReport
from fastlip.norms._solve import Settings, memory_for, operator_norms


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
    check: bool = ...,
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
    check: bool = ...,
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
    check: bool = True,
) -> NormReport | list[NormReport]:
    """Norm intervals of every convolution and linear layer of a model, on the input sizes they really have.

    The model runs on a few random inputs, in eval mode, to learn those sizes, and what each layer made of its input is
    compared with the map whose norm is reported. Models of the same classes, attributes and tensor shapes, such as
    checkpoints of one model, are taken to run alike: one of them runs in each call. Layers that did not run are left
    out; one that ran on several sizes, or in front of several BatchNorms, appears once
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
        check: whether to compare what layers do with what is said of them, hooks and all, and to see that it does not
            depend on the batch. Without, the model runs once, on zeros.

    Returns:
        A report, or a list of them, one per model.

    Raises:
        TypeError: a model is no module.
        ValueError: an argument is wrong, a model does not run on such inputs, or it is unknown what a layer applies, or
            it is something else than its weight says, or that holds NaN or infinite values; the message names it.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    models = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    bare = [bare_model(m) for m in models]
    memory = memory_for(max_memory, (t for m in bare for t in m.parameters()))
    settings = Settings(rtol, confidence, method, starts, max_steps, dtype, memory, generator, progress)
    with ExitStack() as running:
        # Weights that a forward computes or writes are what they were in it until this ends.
        collected = _collect(bare, checked_shape(input_shape), fold_batchnorm, check, running)
        every = [layer for layers in collected for layer in layers]
        operators = [layer.operator for layer in every if layer.operator is not None]
        compute_frobenius(operators)
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


@dataclass(frozen=True)
class _Plan:
    """What is to be known of the layers that run, in order, but for their numbers.

    Attributes:
        slots: the layers.
        shared: whether it holds for all models of one structure: each layer ran with the weight it holds, as no one
            else's could serve another model.
    """

    slots: list[_Slot]
    shared: bool


def _plan(
    model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, several: bool = False
) -> _Plan:
    """Run the model, which is in eval mode, and say what its layers are; to ``several`` models if they are alike."""
    modules = dict(model.named_modules())
    index = {id(module): i for i, module in enumerate(modules_of(model))}
    ran = _record(model, input_shape, fold_batchnorm, check, several)
    for name, *_, batchnorm in ran.calls:
        user = batchnorm or (name if isinstance(modules[name], BATCHNORMS) else None)
        if user is not None:
            _require_batchnorm(modules[user], _shown(user, modules), _shown(name, modules))
    found: list[_Slot] = []
    repeats: Counter[str] = Counter()
    for name, shape, output_shape, batchnorm in ran.calls:
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
    if check:
        require_agreement(ran.uses)
    return _Plan(found, ran.by_own_weights)


def _require_batchnorm(module: nn.Module, shown: str, layer: str) -> None:
    """Raise ValueError unless a BatchNorm multiplies by its factors."""
    kind = next(cls for cls in BATCHNORMS if isinstance(module, cls))
    if not keeps_forward(module, kind):
        raise ValueError(
            f"layer {shown}: {type(module).__name__} has another forward than {kind.__name__}, and may do something "
            "else than multiply by its factors"
        )
    if module.running_var is None:
        raise ValueError(f"layer {layer}: {NO_STATISTICS}")


def _collect(
    models: Sequence[nn.Module], input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, running: ExitStack
) -> list[list[_Layer]]:
    """The layers of each model that run, in order; nothing is read from the device of their weights.

    Of models of one structure only the first runs; those that do are in eval mode until ``running`` ends.
    """
    plans: list[list[_Slot]] = []
    known: dict[Hashable, list[_Slot]] = {}
    for model in models:
        key, training = structure(model), model.training
        if key is None or key not in known:
            running.enter_context(eval_mode(model))
            try:
                plan = _plan(model, input_shape, fold_batchnorm, check, len(models) > 1)
            except ValueError:
                # A BatchNorm that takes the batch's statistics may be why it does not run.
                require_eval(model, training, model.modules())
                raise
            plans.append(plan.slots)
            if key is not None and plan.shared:
                known[key] = plan.slots
        else:
            plans.append(known[key])
        held = modules_of(model)
        require_eval(model, training, [held[slot.batchnorm] for slot in plans[-1] if slot.batchnorm is not None])
    return _with_numbers(plans, [modules_of(model) for model in models])


def _with_numbers(plans: Sequence[list[_Slot]], modules: Sequence[list[nn.Module]]) -> list[list[_Layer]]:
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


@dataclass
class _Record:
    """What layers did as a model ran."""

    calls: list[_Ran]
    uses: list[Use]
    by_own_weights: bool


def _record(
    model: nn.Module, input_shape: tuple[int, ...], fold_batchnorm: bool, check: bool, several: bool
) -> _Record:
    """Run the model, which is in eval mode, and record what its layers were given, each call of one kind once.

    With ``check`` it runs on random inputs, in batches of two sizes, and what layers made of one input is kept.

    Raises:
        ValueError: the model does not run, or what it does depends on the batch.
    """
    if not check:
        first = _run_once(model, example_input(model, input_shape), input_shape, fold_batchnorm, several=several)
        return _Record(list(dict.fromkeys(first.calls)), [], first.by_own_weights)
    x = random_inputs(model, input_shape, 2)
    both = _run_once(model, x, input_shape, fold_batchnorm, several=several)
    first = _run_once(model, x[:1], input_shape, fold_batchnorm, keep=True)
    if first.calls != both.calls:
        pairs = zip_longest(first.calls, both.calls)
        name = next((one or other)[0] for one, other in pairs if one != other)
        raise ValueError(
            f"layer {name or type(model).__name__} is used otherwise in a batch of two inputs than in one of one, so "
            "that it has no norm for itself; check=False takes it as it is for one input"
        )
    first.calls, first.by_own_weights = list(dict.fromkeys(first.calls)), both.by_own_weights
    return first


def _run_once(
    model: nn.Module,
    x: Tensor,
    input_shape: tuple[int, ...],
    fold_batchnorm: bool,
    *,
    keep: bool = False,
    several: bool = False,
) -> _Record:
    """Run the model; with ``keep`` what layers made of their inputs is kept, with ``several`` their weights watched."""
    calls: list[_Call] = []
    uses: list[Use] = []
    watched = _Weights(model) if several else None
    handles = []

    def hook(name: str, module: nn.Module) -> None:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if keep:
                uses.append(Use(name or type(model).__name__, module, x.detach().clone(), output.detach().clone()))
            if watched is not None:
                watched.look(module)
            if isinstance(module, BATCHNORMS) and fold_batchnorm:
                # The very tensor a layer returned, and not written to since, as an in-place ReLU would.
                source = next((c for c in reversed(calls) if c.output is x and c.version == version_of(x)), None)
                # Of a linear layer on [B, L, features] it scales L, and not the features.
                fits = source is not None and (x.dim() == 2 or not source.linear)
                if source is not None and fits and source.batchnorm is None:
                    source.batchnorm = name
                    return
            shapes = tuple(x.shape[1:]), tuple(output.shape[1:])
            calls.append(_Call(name, *shapes, output, version_of(output), isinstance(module, nn.Linear)))

        handles.append(module.register_forward_hook(record, with_kwargs=True))

    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, *TRANSPOSED, *BATCHNORMS, nn.Linear)):
            hook(name, module)
    try:
        with torch.no_grad(), runs_on(model, input_shape):
            model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    own = watched is not None and watched.untouched()
    return _Record([(c.name, c.input_shape, c.output_shape, c.batchnorm) for c in calls], uses, own)


class _Weights:
    """Whether layers ran with the weights that they hold, as one structure's others then do with theirs."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            m: (w, w.data_ptr(), w.detach().clone()) for m in model.modules() if (w := _weight(m)) is not None
        }
        self._same = True
        self._changed: list[Tensor] = []

    def look(self, module: nn.Module) -> None:
        """Compare a layer's weight, as it is used, with what it was."""
        now = _weight(module)
        weight, address, values = self._before.get(module, (None, 0, None))
        if now is None or values is None or now is not weight or now.data_ptr() != address:
            # Computed, or exchanged; without one there is nothing to exchange.
            self._same &= getattr(module, "weight", None) is None
        elif now.numel():
            self._changed.append((now.detach() != values).any())

    def untouched(self) -> bool:
        """Whether all were as before; devices are read once."""
        return self._same and not (self._changed and any(torch.stack([c.cpu() for c in self._changed]).tolist()))


def _weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")
