"""The norms of all layers of a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.norms._interval import NormInterval
from fastlip.norms._modules import (
    BATCHNORMS,
    CONVS,
    TRANSPOSED,
    batchnorm_scale,
    describe_module,
    diagonal_norm,
    module_operator,
)
from fastlip.norms._operator import Operator
from fastlip.norms._report import NormReport
from fastlip.norms._solve import Settings, operator_norms


@dataclass
class _Call:
    """One layer at work: what it is, on what shape, and which BatchNorm follows it."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output: Tensor
    version: int
    batchnorm: nn.Module | None = None


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
    max_memory: int = ...,
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
    max_memory: int = ...,
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
    max_memory: int = 1 << 31,
    progress: Callable[[int, int], None] | None = None,
) -> NormReport | list[NormReport]:
    """Norm intervals of every convolution and linear layer of a model, on the input sizes they really have.

    The model runs once on a zero input, in eval mode, to learn those sizes. Layers that did not run are left out; one
    that ran on several sizes, or before several BatchNorms, appears once for each. BatchNorm that stands alone appears
    as its factor max |gamma| / sqrt(var + eps). Weights in other hands are not seen: those of functional calls, and of
    modules that apply them by themselves, such as ``nn.MultiheadAttention``.

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
    settings = Settings(rtol, confidence, method, starts, max_steps, dtype, max_memory, generator, progress)
    models = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    collected = [_collect(bare_model(m), input_shape, fold_batchnorm) for m in models]
    solved = iter(operator_norms([x for layers in collected for *_, x in layers if isinstance(x, Operator)], settings))
    reports = []
    for layers in collected:
        intervals = {name: next(solved) if isinstance(x, Operator) else x for name, _, x in layers}
        random = any(interval.confidence < 1.0 for interval in intervals.values())
        reports.append(
            NormReport(
                intervals,
                {name: description for name, description, _ in layers},
                confidence if random else 1.0,
                generator.initial_seed() if random else None,
            )
        )
    return reports[0] if isinstance(model, nn.Module) else reports


def _collect(
    model: nn.Module, input_shape: Sequence[int], fold_batchnorm: bool
) -> list[tuple[str, str, Operator | NormInterval]]:
    """Name, description and operator of each layer, or its interval where that is a maximum."""
    found: list[tuple[str, str, Operator | NormInterval]] = []
    seen: set[tuple[str, tuple[int, ...], nn.Module | None]] = set()
    for call in _record(model, input_shape, fold_batchnorm):
        use = (call.name, call.input_shape, call.batchnorm)
        if use in seen:
            continue
        seen.add(use)
        repeats = sum(name == call.name for name, *_ in seen)
        name = call.name if repeats == 1 else f"{call.name}#{repeats}"
        description = describe_module(call.module, call.input_shape)
        try:
            if isinstance(call.module, BATCHNORMS):
                norm = diagonal_norm(batchnorm_scale(call.module))
                found.append((name, description, NormInterval(norm * (1 - 2e-14), norm, 1.0, "closed form", 0, True)))
                continue
            scale = None
            if call.batchnorm is not None:
                scale = batchnorm_scale(call.batchnorm)
                description += " + BN"
            size = call.output_shape[1:] if isinstance(call.module, TRANSPOSED) else None
            op = module_operator(call.module, call.input_shape, output_scale=scale, output_size=size)
            found.append((name, description, op))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    return found


def _record(model: nn.Module, input_shape: Sequence[int], fold_batchnorm: bool) -> list[_Call]:
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
                fits = source is not None and (x.dim() == 2 or not isinstance(source.module, nn.Linear))
                if source is not None and fits and source.batchnorm is None:
                    source.batchnorm = module
                    return
            calls.append(_Call(name, module, tuple(x.shape[1:]), tuple(output.shape[1:]), output, output._version))

        handles.append(module.register_forward_hook(record, with_kwargs=True))

    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, *TRANSPOSED, *BATCHNORMS, nn.Linear)):
            hook(name or type(module).__name__, module)
    try:
        with eval_mode(model), torch.no_grad(), runs_on(model, input_shape):
            model(example_input(model, input_shape))
    finally:
        for handle in handles:
            handle.remove()
    return [replace(call, output=torch.empty(0)) for call in calls]


def example_input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """A zero input, [1, *input_shape], in the dtype and on the device of the model's first parameter or buffer.

    Raises:
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape must be positive integers without the batch axis, got {input_shape!r}")
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
