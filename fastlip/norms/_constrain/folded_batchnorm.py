"""A layer's weight with the BatchNorm behind it, as it is while both are trained."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlip.norms._constrain.norm_gradients import computing_dtype
from fastlip.norms._operators.modules import scale_channels


@torch.library.custom_op("fastlip::as_now", mutates_args=())
def as_now(statistics: Tensor) -> Tensor:
    """A copy that compiled code keeps for its backward pass.

    It would recompute what comes from running statistics there, from statistics that the forward pass has moved
    (torch 2.14, pytorch #197039), unless an operation that it does not know read them.
    """
    return statistics.clone()


@as_now.register_fake
def _(statistics: Tensor) -> Tensor:
    return torch.empty_like(statistics)


def folded_weight(layer: nn.Module, batchnorm: _BatchNorm, gamma: Tensor, transposed: bool, groups: int) -> Tensor:
    """A layer's weight times gamma / sqrt(var + eps) along its output channels, in the dtype to compute with."""
    weight, variance = layer.weight, batchnorm.running_var
    assert isinstance(weight, Tensor)
    assert isinstance(variance, Tensor)
    dtype = computing_dtype(weight)
    if torch.compiler.is_compiling():
        variance = as_now(variance)
    factors = gamma.to(dtype) * torch.rsqrt(variance.to(dtype) + batchnorm.eps)
    first, second = (None, factors) if transposed else (factors, None)
    return scale_channels(weight.to(dtype), first, second, groups)
