"""Weights times bound / norm, with the gradient of that.

The functions work under :mod:`torch.func`, which needs ``setup_context``.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlip.norms._constrain.norm_gradients import NormGradient, computable
from fastlip.norms._constrain.transforms import without_autocast


class KnowsGradient(Protocol):
    """Knows the gradient of a weight's norm, and the norm, or computes them when they are asked for."""

    def __call__(self) -> tuple[NormGradient, float]: ...


class Scale(torch.autograd.Function):
    """The weight times min(1, bound / norm), where the norm is <G, weight>; a number, or a tensor that is not read."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, left: Tensor, right: Tensor, norm: Tensor | float, bound: float) -> Tensor:
        scale = (bound / norm).clamp(max=1.0) if isinstance(norm, Tensor) else bound / norm
        return (weight * scale).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, left, right, norm, bound = inputs
        ctx.save_for_backward(output, left, right, *([norm] if isinstance(norm, Tensor) else []))
        ctx.norm, ctx.bound = norm if isinstance(norm, float) else None, bound

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, left, right, *norms = ctx.saved_tensors
        norm = norms[0] if norms else ctx.norm
        with without_autocast(grad.device):
            found = NormGradient(left, right).through_scale(computable(grad), computable(scaled), norm, ctx.bound)
        return found.to(grad.dtype), None, None, None, None


class EagerScale(torch.autograd.Function):
    """The same outside of transforms and compilers, in less time: torch does not look at its signature in each call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = Scale.forward(*inputs)
        Scale.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Scale.backward(ctx, *grads)


class Norm(torch.autograd.Function):
    """A norm that is known, with its gradient G in the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, left: Tensor, right: Tensor, norm: Tensor | float) -> Tensor:
        return norm.to(weight.dtype, copy=True) if isinstance(norm, Tensor) else weight.new_tensor(norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, left, right, _ = inputs
        ctx.save_for_backward(left, right)
        ctx.shape = weight.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        product = left @ right if right.numel() else left
        return (grad * product).view(ctx.shape).to(grad.dtype), None, None, None


class CertifiedScale(torch.autograd.Function):
    """The weight times a certified number, with the gradient of bound / norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, gradient: KnowsGradient, scale: float) -> Tensor:
        return weight * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.gradient, ctx.scale = inputs
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scaled,) = ctx.saved_tensors
        gradient, norm = ctx.gradient()
        with without_autocast(grad.device):
            found = gradient.through_scale(computable(grad), computable(scaled), norm, norm * ctx.scale)
        return found.to(grad.dtype), None, None
