"""Certified bounds of one trained model: its layers' operator norms and its upper Lipschitz constant."""

import math

import torch
from torch import nn

from fastlip import layer_norms, lipschitz_bound
from fastlip.study.errors import StudyError
from fastlip.study.storage.schema import Layer, Lipschitz


def layer_norms_and_bound(model: nn.Module, input_shape: tuple[int, int, int], eta: float, seed: int) -> Lipschitz:
    """Intervals of the norms of all layers, their product, and the bound for the whole network.

    Args:
        model: in evaluation mode.
        input_shape: [C, H, W] of one image.
        eta: probability that any upper bound is wrong, half of it for the layers and half for the whole network.
        seed: of the random starts; it must not depend on the weights.

    Raises:
        StudyError: the model's output is the same for all images.
    """
    generator = torch.Generator().manual_seed(seed)
    report = layer_norms(model, input_shape, confidence=1 - eta / 2, generator=generator)
    # The normalisation of the input, which all networks share, is in the bound, but is no layer of the network.
    layers = {name: interval for name, interval in report.items() if not name.startswith("normalize.")}
    bound = lipschitz_bound(model, input_shape, confidence=1 - eta / 2, generator=generator)
    return Lipschitz(
        log10_upper=_of_a_function(bound.log10_upper),
        log10_margin=bound.log10_margin,
        confidence=bound.confidence,
        log10_layer_product=_above_zero(sum(_log10(interval.upper) for interval in layers.values())),
        layers=[
            Layer(
                name=name,
                kind=report.descriptions[name],
                lower=interval.lower,
                upper=interval.upper,
                confidence=interval.confidence,
                method=interval.method,
            )
            for name, interval in layers.items()
        ],
    )


def network_bound(model: nn.Module, input_shape: tuple[int, int, int], eta: float, seed: int) -> Lipschitz:
    """The bound for the whole network alone, for snapshots; arguments as in :func:`layer_norms_and_bound`."""
    generator = torch.Generator().manual_seed(seed)
    bound = lipschitz_bound(model, input_shape, confidence=1 - eta, generator=generator)
    return Lipschitz(
        log10_upper=_of_a_function(bound.log10_upper),
        log10_margin=bound.log10_margin,
        confidence=bound.confidence,
        log10_layer_product=_above_zero(bound.log10_product),
        layers=[],
    )


def _log10(x: float) -> float:
    return math.log10(x) if x > 0.0 else -math.inf


def _above_zero(log10: float) -> float | None:
    return None if log10 == -math.inf else log10


def _of_a_function(log10: float) -> float:
    if log10 == -math.inf:
        raise StudyError("the model's logits are the same for all images: there is nothing to measure")
    return log10
