"""The norms of all layers of a model."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Unpack, overload

from torch import nn

from fastlip.norms._interval import DID_NOT_RUN, NormInterval
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
    strict: bool = ...,
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
    strict: bool = ...,
    options: NormOptions | None = ...,
    **keywords: Unpack[NormKeywords],
) -> list[NormReport]: ...
def layer_norms(
    model: nn.Module | Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    fold_batchnorm: bool = True,
    check: bool = True,
    strict: bool = False,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> NormReport | list[NormReport]:
    """Norm intervals of every linear map with weights that a model applies, on the input sizes they really have.

    The model runs on a few random inputs, in eval mode. Its convolutions and linear layers are found there, and so are
    the calls of torch's functions that apply a weight of the model by themselves: ``F.linear``, convolutions, products
    with one matrix, multiplications by factors, and multi-head attention, whose packed weight appears as
    ``in_proj_weight[q]``, ``[k]`` and ``[v]``. Where a layer has a forward of its own, as for another padding or a
    standardised weight, the map is the one that it computes. What each layer made of its input is compared with the map
    whose norm is reported.

    A map has the name of the layer whose weight it applies, or the weight's own; used on several sizes, with several
    settings or in front of several BatchNorms, it appears once for each. A BatchNorm that stands alone appears as its
    factor max |gamma| / sqrt(var + eps); other factors appear alike, and those of a BatchNorm in disguise, which
    multiplies by something computed from a ``running_var``, are folded as well. What remains of the model's weights is
    listed with the reason in :attr:`NormReport.left_out`: recurrences, normalisations by the input's own deviation,
    products of two inputs, layers that do something else than any map that is known, and what did not run; quantised
    layers, by their names, and functions that are given a weight that no module holds, as ``linear()``.

    Models of the same classes, attributes and tensor shapes, such as checkpoints of one model, are taken to run alike:
    one of them runs in each call.

    Args:
        model: the model, in any mode, dtype and on any device; it is left as it was. Or several models, whose layers of
            equal shape are iterated together. Layers have the names that they have inside DataParallel or what
            ``torch.compile`` made.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        fold_batchnorm: multiply a BatchNorm into the layer whose output it takes, before the norm.
        check: whether to compare what layers do with what is said of them, hooks and all, and to see that it does not
            depend on the batch. Without, the model runs once, on zeros.
        strict: refuse a model of which the report would leave out a weight that is used in the run.
        options: how to compute the norms; ``options.confidence`` is that of all layers of all models in the call.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Returns:
        A report, or a list of them, one per model.

    Raises:
        TypeError: a model is no module, or an argument is of the wrong type; the message names it.
        ValueError: an argument is wrong, a model does not run on such inputs, a layer's weight holds NaN or infinite
            values, or with ``strict`` a weight is left out; the message names it.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> report = fastlip.layer_norms(model, (3, 8, 8))
        >>> print(report)
        >>> print(report["0"].upper)
    """
    models = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    bare = [bare_model(m) for m in models]
    chosen = chosen_options("layer_norms", options, keywords)
    resolved = chosen.resolved(t for m in bare for t in m.parameters())
    with ExitStack() as running:
        found = collect_layers(bare, checked_shape(input_shape), fold_batchnorm, check, running)
        if strict:
            _require_whole(own.left_out for own in found)
        every = list(chain.from_iterable(own.layers for own in found))
        alone = iter(require_finite_layers(every))
        operators = [layer.operator for layer in every if layer.operator is not None]
        solved = iter(solve(operators, resolved))
    reports = []
    for own in found:
        intervals = {
            layer.name: next(solved) if layer.operator else _diagonal_interval(next(alone)) for layer in own.layers
        }
        random = any(interval.confidence < 1.0 for interval in intervals.values())
        reports.append(
            NormReport(
                intervals,
                {layer.name: layer.description for layer in own.layers},
                resolved.confidence if random else 1.0,
                resolved.generator.initial_seed() if random else None,
                own.left_out,
            )
        )
    return reports[0] if isinstance(model, nn.Module) else reports


def _require_whole(left_out: Iterable[Mapping[str, str]]) -> None:
    """Raise ValueError for the first weight that ran and is left out."""
    for weights in left_out:
        name = next((name for name, reason in weights.items() if reason != DID_NOT_RUN), None)
        if name is not None:
            raise ValueError(f"weight {name} would be left out: {weights[name]}")


def _diagonal_interval(norm: float) -> NormInterval:
    """The interval of factors that stand alone, from its norm rounded upwards."""
    return NormInterval(norm * (1 - 2e-14), norm, 1.0, "closed form", 0, True)
