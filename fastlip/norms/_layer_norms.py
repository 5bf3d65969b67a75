"""The norms of all layers of a model."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Unpack, overload

from torch import nn

from fastlip.norms._interval import NormInterval
from fastlip.norms._models.collect import collect_layers
from fastlip.norms._models.inputs import checked_shape
from fastlip.norms._models.weights import require_finite_layers
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._options import NormKeywords, NormOptions, chosen_options
from fastlip.norms._report.report import NormReport
from fastlip.norms._solvers.solve import solve


@overload
def layer_norms(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = ...,
    check: bool = ...,
    options: NormOptions | None = ...,
    **keywords: Unpack[NormKeywords],
) -> NormReport: ...
@overload
def layer_norms(
    model: Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = ...,
    check: bool = ...,
    options: NormOptions | None = ...,
    **keywords: Unpack[NormKeywords],
) -> list[NormReport]: ...
def layer_norms(
    model: nn.Module | Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = True,
    check: bool = True,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> NormReport | list[NormReport]:
    """Norm intervals of every convolution and linear layer of a model, on the input sizes they really have.

    The model runs on a few random inputs, in eval mode, to learn those sizes, and what each layer made of its input is
    compared with the map whose norm is reported. Models of the same classes, attributes and tensor shapes, such as
    checkpoints of one model, are taken to run alike: one of them runs in each call. Layers that did not run are left
    out; one that ran on several sizes, or in front of several BatchNorms, appears once for each. A BatchNorm that
    stands alone appears as its factor max |gamma| / sqrt(var + eps). Weights that are used in other ways are not seen:
    those of functional calls, and of modules that apply them by themselves, such as ``nn.MultiheadAttention``.

    Args:
        model: the model, in any mode, dtype and on any device; it is left as it was. Or several models, whose layers of
            equal shape are iterated together. Layers have the names that they have inside DataParallel or what
            ``torch.compile`` made.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        fold_batchnorm: multiply a BatchNorm into the layer whose output it takes, before the norm.
        check: whether to compare what layers do with what is said of them, hooks and all, and to see that it does not
            depend on the batch. Without, the model runs once, on zeros.
        options: how to compute the norms; ``options.confidence`` is that of all layers of all models in the call.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Returns:
        A report, or a list of them, one per model.

    Raises:
        TypeError: a model is no module, or an argument is of the wrong type; the message names it.
        ValueError: an argument is wrong, a model does not run on such inputs, or a layer's map is unknown, is not the
            one that its weight says, or holds NaN or infinite values; the message names it.
    """
    models = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    bare = [bare_model(m) for m in models]
    chosen = chosen_options("layer_norms", options, keywords)
    resolved = chosen.resolved(t for m in bare for t in m.parameters())
    with ExitStack() as running:
        layers = collect_layers(bare, checked_shape(input_shape), fold_batchnorm, check, running)
        every = list(chain.from_iterable(layers))
        alone = iter(require_finite_layers(every))
        operators = [layer.operator for layer in every if layer.operator is not None]
        solved = iter(solve(operators, resolved))
    reports = []
    for own in layers:
        intervals = {layer.name: next(solved) if layer.operator else _diagonal_interval(next(alone)) for layer in own}
        random = any(interval.confidence < 1.0 for interval in intervals.values())
        reports.append(
            NormReport(
                intervals,
                {layer.name: layer.description for layer in own},
                resolved.confidence if random else 1.0,
                resolved.generator.initial_seed() if random else None,
            )
        )
    return reports[0] if isinstance(model, nn.Module) else reports


def _diagonal_interval(norm: float) -> NormInterval:
    """The interval of a BatchNorm that stands alone, from its norm rounded upwards."""
    return NormInterval(norm * (1 - 2e-14), norm, 1.0, "closed form", 0, True)
