"""The output that a layer's weight and settings say it has, by the map whose norm is reported."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlip.norms._operators.batchnorm import BATCHNORMS, batchnorm_scales
from fastlip.norms._operators.modules import TRANSPOSED, module_operator
from fastlip.norms._operators.operator import Operator
from fastlip.norms._operators.registry import find_operator, registered_operator
from fastlip.norms._operators.torch_operator import TorchOperator


def apply_operator(
    operator: Operator,
    x: Tensor,  # [B, *input_shape], or [B, ..., Cin] where the operator is a matrix
    bias: Tensor | None = None,  # [Cout]
    *,
    transposed: bool = False,
    magnitudes: bool = False,
) -> Tensor:
    """Apply an operator to x, or its adjoint where ``transposed``, by torch and in x's dtype.

    With ``magnitudes`` weights and bias are replaced by their absolute values.
    """
    weight = operator.weight.to(x.dtype)
    bias = None if bias is None else bias.detach().to(x.dtype)
    if magnitudes:
        weight, bias = weight.abs(), None if bias is None else bias.abs()
    if not operator.kernel and operator.groups == 1:
        return torch.nn.functional.linear(x, weight, bias)
    by_torch = TorchOperator(operator, weight)
    y = by_torch.adjoint(x) if transposed else by_torch.forward(x)
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


def layer_output(module: nn.Module, x: Tensor, output_shape: Sequence[int], *, magnitudes: bool = False) -> Tensor:
    """The output of a layer on x, [B, ...], by the map whose norm is reported for it, in float32 at least.

    Raises:
        ValueError: there is no such map, see :func:`module_operator`.
    """
    if find_operator(module) is not None:
        return _registered_output(module, x, output_shape, magnitudes)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, BATCHNORMS):
        ones = (1,) * (x.dim() - 2)
        scale = batchnorm_scales([module])[0].to(x)
        shift = -scale * module.running_mean.to(x)  # type: ignore[union-attr]
        shift = shift if module.bias is None else shift + module.bias.detach().to(x)
        if magnitudes:
            scale, shift = scale.abs(), shift.abs()
        return x * scale.view(-1, *ones) + shift.view(-1, *ones)
    transposed = isinstance(module, TRANSPOSED)
    size = output_shape[2:] if transposed else None
    operator = module_operator(module, x.shape[1:], output_size=size, finite=False)
    return apply_operator(operator, x, module.bias, transposed=transposed, magnitudes=magnitudes)  # type: ignore[arg-type]


def _registered_output(module: nn.Module, x: Tensor, output_shape: Sequence[int], magnitudes: bool) -> Tensor:
    """By the operator that is registered for the layer, and by what the layer makes of zeros."""
    operator = registered_operator(module, x.shape[1:])
    with torch.no_grad():
        offset = module(torch.zeros_like(x[:1]))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not operator.kernel and x.shape[-1:] != operator.input_shape:
        x = x.flatten(1)
    y = apply_operator(operator, x, magnitudes=magnitudes)
    return y.reshape(output_shape) + (offset.abs() if magnitudes else offset)
