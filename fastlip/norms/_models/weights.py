"""Layers with their numbers: weights, and the factors of the BatchNorms that are folded into them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastlip.norms._models.layer import Layer, LayerTemplate
from fastlip.norms._operators.batchnorm import batchnorm_scales, diagonal_norms, require_finite_scale
from fastlip.norms._operators.modules import scaled
from fastlip.norms._operators.operator import compute_frobenius, require_finite


def fill_templates(templates: Sequence[list[LayerTemplate]], modules: Sequence[list[nn.Module]]) -> list[list[Layer]]:
    """The layers of each model from its templates and its modules; nothing is read from a device."""
    batchnorms = {
        id(held[template.batchnorm]): held[template.batchnorm]
        for own, held in zip(templates, modules, strict=True)
        for template in own
        if template.batchnorm is not None
    }
    scales = dict(zip(batchnorms, batchnorm_scales(list(batchnorms.values())), strict=True))
    weights = _weights(templates, modules, scales)
    found = []
    for own, held in zip(templates, modules, strict=True):
        layers = []
        for template in own:
            scale = _scale(template, held, scales)
            operator = None if template.geometry is None else template.geometry.with_weight(next(weights))
            layers.append(Layer(template.name, template.description, operator, scale))
        found.append(layers)
    return found


def _weights(
    templates: Sequence[list[LayerTemplate]], modules: Sequence[list[nn.Module]], scales: dict[int, Tensor]
) -> Iterator[Tensor]:
    """The weights of all layers, multiplied by the factors of the BatchNorms that follow, in order."""
    found: list[Tensor] = []
    alike: dict[tuple[object, ...], list[tuple[int, Tensor, LayerTemplate]]] = defaultdict(list)
    for own, held in zip(templates, modules, strict=True):
        for template in own:
            if template.geometry is None:
                continue
            assert template.weight is not None
            weight = template.weight.of(held)
            scale = _scale(template, held, scales)
            if scale is not None:
                if _launches_cost(weight.device):
                    alike[id(template), weight.dtype, weight.device].append((len(found), scale, template))
                else:
                    weight = _folded(weight, scale, template)
            found.append(weight)
    for group in alike.values():  # one layer of all models at once
        places, factors, (template, *_) = zip(*group, strict=True)
        together = _folded(torch.cat([found[i] for i in places]), torch.cat(factors), template, len(group))
        for i, part in zip(places, together.chunk(len(group)), strict=True):
            found[i] = part
    return iter(found)


def _scale(template: LayerTemplate, held: Sequence[nn.Module], scales: dict[int, Tensor]) -> Tensor | None:
    """The factors of a layer, if it has some: those of a BatchNorm, or others."""
    if template.batchnorm is not None:
        return scales[id(held[template.batchnorm])]
    return None if template.factors is None else template.factors.of(held)


def _folded(weight: Tensor, scale: Tensor, template: LayerTemplate, count: int = 1) -> Tensor:
    """A layer's weights in ``count`` models, one after the other, times their BatchNorms' factors."""
    assert template.geometry is not None
    first, second = (None, scale) if template.transposed else (scale, None)
    return scaled(weight, first, second, count * template.geometry.groups)


def _launches_cost(device: torch.device) -> bool:
    """Whether one operation on joined memory takes less time than several on its parts."""
    return device.type == "cuda"


def require_finite_layers(layers: Sequence[Layer]) -> list[float]:
    """Compute the Frobenius norms of all weights; returns the norms of the BatchNorms that stand alone, in order.

    Raises:
        ValueError: a weight or a BatchNorm's factors are not finite; the message names the layer.
    """
    compute_frobenius(layer.operator for layer in layers if layer.operator is not None)
    alone = diagonal_norms([layer.scale for layer in layers if layer.operator is None and layer.scale is not None])
    factors = iter(alone)
    for layer in layers:
        norm = layer.operator.frobenius if layer.operator is not None else next(factors)
        if not math.isfinite(norm):
            _require_finite(layer)
    return alone


def _require_finite(layer: Layer) -> None:
    """Raise ValueError where factors or weight are not finite; a finite weight's norm may overflow."""
    try:
        if layer.scale is not None:
            require_finite_scale(layer.scale)
        if layer.operator is not None:
            require_finite(layer.operator)
    except ValueError as error:
        raise ValueError(f"layer {layer.name}: {error}") from None
