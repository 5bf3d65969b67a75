"""Functions of the graph's tensors as functions of samples, wherever the graph's tensors have their batch axis."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._steps import Step, in_graph

#: From tensors of the graph to a tensor of the graph.
GraphFunction = Callable[[Tensor], Tensor]


def on_samples(function: GraphFunction, source: Step, alone: bool, batch: int) -> GraphFunction:
    """A function of one tensor of the graph, as one of samples, [D, *shape] to [D, *other shape].

    Args:
        function: the function.
        source: the step whose output it takes.
        alone: whether the batch's axis is alone in front of what it gives.
        batch: the number of samples that the graph takes at once.
    """

    def on(t: Tensor) -> Tensor:
        rows = [function(in_graph(t[i : i + 1], source, batch)) for i in range(len(t))]
        return torch.cat([row[:1] if alone else row[None] for row in rows])

    return on


def increasing(on: GraphFunction, norm: float | None = None) -> Callable[..., Interval]:
    """Bounds of the values of a function of samples that rises with each element, without rounding.

    Args:
        on: the function.
        norm: its norm, if it is linear.
    """

    def interval(*args: Any, **kwargs: Any) -> Interval:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Interval))
        size = None if norm is None else x.norm * (norm * (1.0 + 4.0 * EPS))
        return Interval(on(x.lower), on(x.upper), size)

    return interval


def aligned(t: Tensor, source: Step, rank: int) -> Tensor:
    """Samples, [D, *shape], with all axes of the graph's tensor, and more of size 1 in front of these.

    Args:
        t: the samples.
        source: the step of whose output they are.
        rank: number of axes after the first; a batch axis that is alone counts as one of size 1.
    """
    axes = (1, *source.shape) if source.alone else source.shape
    return t.reshape(len(t), *(1,) * (rank - len(axes)), *axes)
