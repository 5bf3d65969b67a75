"""Which layers of a model can be constrained, and the linear maps that they are."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fastlip.norms._constrain.folded_batchnorm import folded_weight
from fastlip.norms._constrain.norm_gradients import computing_dtype
from fastlip.norms._interval import DID_NOT_RUN
from fastlip.norms._models.collect import layers_that_run
from fastlip.norms._models.inputs import checked_shape
from fastlip.norms._models.layer import LayerTemplate
from fastlip.norms._models.structure import modules_of
from fastlip.norms._operators.modules import CONVS, TRANSPOSED
from fastlip.norms._operators.operator import Operator, require_finite, require_floating
from fastlip.norms._operators.trim import flatten, trim
from fastlip.norms._spectral_norm_value import leading_vector, unit

Layers = Collection[str] | Callable[[str, nn.Module], bool]

_KINDS = (*CONVS, *TRANSPOSED, nn.Linear)
#: Accuracy and most steps of the iteration that the first vectors come from.
_START_RTOL, _START_STEPS = 1e-3, 100


@dataclass(frozen=True)
class ConstrainableLayer:
    """A layer whose weight is its linear map's, perhaps with a BatchNorm behind it.

    Attributes:
        name: qualified name.
        module: the layer.
        geometry: the map, with a weight that holds no numbers; a matrix where windows do not overlap.
        input_size: spatial size of the layer's input; of a transposed convolution that of the map's output.
        transposed: whether the map is the adjoint, so that output channels are the weight's second axis.
        batchnorm: the BatchNorm that is folded into the layer.
    """

    name: str
    module: nn.Module
    geometry: Operator
    input_size: tuple[int, ...]
    transposed: bool
    batchnorm: _BatchNorm | None

    @property
    def weight(self) -> Tensor:
        """The module's weight as it is now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def start_vectors(self, generator: torch.Generator) -> Tensor:
        """The first singular vector by a Lanczos iteration, and one orthogonal to it, [2, Cin, *input_size].

        They are in the weight's dtype, at least float32.

        Raises:
            ValueError: the weight holds NaN or infinite values; the message names the layer.
        """
        weight = self.weight.detach()
        if self.batchnorm is not None:
            with torch.no_grad():
                gamma = self.batchnorm.weight
                weight = folded_weight(self.module, self.batchnorm, gamma, self.transposed, self.geometry.groups)
        op = self.geometry.with_weight(weight.reshape(self.geometry.weight.shape))
        try:
            require_finite(op)
        except ValueError as error:
            raise ValueError(f"layer {self.name}: {error}") from None
        drawn = torch.randn(2, *op.input_shape, dtype=torch.float64, generator=generator, device=generator.device)
        first, second = drawn.cpu()
        leading = leading_vector(op, _START_RTOL, _START_STEPS, generator)
        first = unit(first if leading is None else leading.cpu())
        second = unit(second - (second * first).sum() * first)
        return torch.stack([first, second]).to(weight.device, computing_dtype(weight))


def constrainable_layers(
    model: nn.Module, input_shape: Collection[int], layers: Layers | None, fold_batchnorm: bool = False
) -> list[ConstrainableLayer]:
    """The layers that are chosen, in the order in which they run.

    Raises:
        TypeError: ``layers`` is of the wrong type, or a weight no floating-point tensor.
        ValueError: a name is none of a layer's, the model does not run, or a layer cannot be constrained; the message
            names it.
    """
    chosen = _chosen(model, layers)
    templates, left_out = layers_that_run(model, checked_shape(tuple(input_shape)), fold_batchnorm)
    modules = modules_of(model)
    uses: dict[nn.Module, list[LayerTemplate]] = {}
    for template in templates:
        if template.weight is not None:
            uses.setdefault(modules[template.weight.module], []).append(template)
    found = {}
    for name, module in chosen.items():
        if isinstance(weight := module._parameters.get("weight"), Tensor) and weight.numel() == 0:
            continue  # its norm is 0
        own = [t for t in uses.get(module, []) if t.weight is not None and t.weight.attribute == "weight"]
        reason = _obstacle(module, own, left_out.get(f"{name}.weight", left_out.get(name)))
        folded = own[0].batchnorm if own else None
        if reason is None and own and own[0].factors is not None:
            reason = "the batch norm behind it is not that of a BatchNorm module"
        if reason is None and folded is not None:
            reason = _batchnorm_obstacle(modules[folded], [t for t in templates if t.batchnorm == folded])
        if reason == DID_NOT_RUN:
            if layers is not None and not callable(layers):
                raise ValueError(f"layer {name} does not run on inputs of shape {list(input_shape)}")
        elif reason is not None:
            raise ValueError(f"layer {name} cannot be constrained: {reason}; ``layers`` may leave it out")
        else:
            found[module] = _layer(name, module, own[0], None if folded is None else modules[folded])
    return sorted(found.values(), key=lambda layer: list(uses).index(layer.module))


def _chosen(model: nn.Module, layers: Layers | None) -> dict[str, nn.Module]:
    every: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, _KINDS)}
    if layers is None:
        return every
    if callable(layers):
        return {name: module for name, module in every.items() if layers(name, module)}
    if isinstance(layers, str) or not isinstance(layers, Collection):
        raise TypeError(f"layers must be names, a function or None, got {layers!r:.80}")
    for name in layers:
        if name not in every:
            raise ValueError(f"layers must be names of Conv, ConvTranspose or Linear modules, got {name!r}")
    return {name: every[name] for name in every if name in layers}


def _obstacle(module: nn.Module, uses: list[LayerTemplate], left_out: str | None) -> str | None:
    """Why a layer cannot be constrained; None if it can."""
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrised already"
    if left_out is not None:
        return left_out
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is no parameter of its own"
    if not uses:
        return "its weight is used as another map than that of its class"
    (first, *others) = uses
    if others:
        return "it is used on inputs of several sizes, or in several ways"
    assert first.weight is not None
    if first.weight.rows is not None or first.weight.transposed or first.weight.computed is not None:
        return "its weight is not used as it is"
    return None


def _batchnorm_obstacle(module: nn.Module, uses: list[LayerTemplate]) -> str | None:
    """Why a layer cannot be constrained with the BatchNorm behind it; None if it can."""
    if parametrize.is_parametrized(module, "weight"):
        return "the weight of the BatchNorm behind it is parametrised already"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "the BatchNorm behind it has no weight to scale (affine=False)"
    return "the BatchNorm behind it is behind other layers too" if len(uses) > 1 else None


def _layer(name: str, module: nn.Module, template: LayerTemplate, batchnorm: nn.Module | None) -> ConstrainableLayer:
    assert template.geometry is not None
    assert batchnorm is None or isinstance(batchnorm, _BatchNorm)
    return one_layer(name, module, template.geometry, template.transposed, batchnorm)


def one_layer(
    name: str, module: nn.Module, op: Operator, transposed: bool, batchnorm: _BatchNorm | None = None
) -> ConstrainableLayer:
    """A layer whose map, or of a transposed convolution its adjoint, is an operator.

    Raises:
        TypeError: the weight is no floating-point tensor.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    require_floating(weight)
    flat = flatten(op) if trim(op) is op else op
    flat = flat.with_weight(torch.empty(flat.weight.shape, dtype=flat.weight.dtype, device="meta"))
    size = op.output_size if transposed else op.input_size
    return ConstrainableLayer(name, module, flat, size, transposed, batchnorm)
