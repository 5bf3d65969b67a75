"""A layer of a model, with its weight and without."""

from dataclasses import dataclass

from torch import Tensor

from fastlip.norms._models.held import Factors, Source
from fastlip.norms._operators.operator import Operator


@dataclass(frozen=True)
class Layer:
    """A layer of a model.

    Attributes:
        name: qualified name, followed by a number from the second shape on that the layer ran on.
        description: short description for the report.
        operator: the layer's linear map; None for factors alone.
        scale: factors [C] of the BatchNorm that is folded into the layer, or factors that the layer is.
    """

    name: str
    description: str
    operator: Operator | None
    scale: Tensor | None


@dataclass(frozen=True)
class LayerTemplate:
    """A layer of any model of one structure; modules are numbered by their place in :func:`modules_of`.

    Attributes:
        name: as in :class:`Layer`.
        description: as in :class:`Layer`.
        weight: where the weight comes from; None for factors alone.
        geometry: the linear map, with a weight that holds no numbers; None for factors alone.
        batchnorm: the BatchNorm that is folded into the layer, or that the layer is.
        factors: the factors that are folded into the layer, or that the layer is, where that is no such module.
        transposed: whether the map is the adjoint, so that output channels are the weight's second axis.
    """

    name: str
    description: str
    weight: Source | None
    geometry: Operator | None
    batchnorm: int | None
    factors: Factors | None = None
    transposed: bool = False


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model that ran, in order, and the weights that none of them accounts for, with the reason."""

    layers: list[Layer]
    left_out: dict[str, str]
