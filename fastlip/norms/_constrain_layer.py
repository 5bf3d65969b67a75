"""The parametrisation of one layer among many whose norms are kept below a bound together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlip.norms._constrain_factors import NormGradient, computable, computing_dtype, encode, norm_gradients
from fastlip.norms._constrain_norm import certified_uppers, settled_vector
from fastlip.norms._operators.operator import Operator, require_finite
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._options import NormOptions

#: On a CPU a layer's vectors take a step in one of so many forwards at most. The interval is doubled where a step
#: raises the norm by less than the first share, and halved where it does by more than the second.
_LONGEST, _STEADY, _MOVING = 8, 3e-4, 1e-3
#: Change of a norm between two forwards after which the vectors take a step in the next one.
_JUMP = 1e-2


class _Certificate:
    """A weight [Cout, Cin / groups, *kernel], and the upper side of its norm."""

    def __init__(self, weight: Tensor, upper: float) -> None:
        self.weight, self.upper = weight, upper
        self._gradient: tuple[NormGradient, float] | None = None

    def gradient(self, constraint: "NormConstraint") -> tuple[NormGradient, float]:
        """The gradient of the weight's norm, and that norm, by power iteration until it stands still."""
        if self._gradient is None:
            weight = computable(self.weight)
            convolution = TorchOperator(constraint.geometry, constraint.operator(weight).weight)
            vector = settled_vector(convolution, constraint.v.to(weight.dtype))
            _, left, right = norm_gradients([weight], [vector], constraint.encoded, 1)
            found = NormGradient(left, right)
            self._gradient = found, float(found.norm_of(weight))
        return self._gradient


class _Tracking:
    """What a constraint remembers from one forward to the next, beside its vector.

    Attributes:
        gradient: of the norm in the weight; None until the first step.
        norm: the norm that the last forward in training found on a CPU.
        wait: forwards until the vectors' next step.
        interval: forwards from one step to the next.
        prepared: whether the model's forward is running, and took the steps that are due, or certified the layer.
        together: layers in eval mode that the model's forward, which is running, certifies with this one.
        certificate: what eval mode goes by.
    """

    def __init__(self) -> None:
        self.gradient: NormGradient | None = None
        self.norm = 0.0
        self.wait, self.interval = 0, 1
        self.prepared = False
        self.together: list[tuple[NormConstraint, Tensor]] = []
        self.certificate: _Certificate | None = None


class NormConstraint(nn.Module):
    """The weight, scaled so that its norm stays below the bound.

    Attributes:
        name: qualified name of the layer.
        v: the first singular vector so far, [Cin, *input_size], or [Cin] of what is a matrix.
    """

    v: Tensor

    def __init__(
        self, name: str, geometry: Operator, vector: Tensor, bound: float, iterations: int, options: NormOptions
    ) -> None:
        super().__init__()
        self.name, self.bound, self.iterations, self.options = name, bound, iterations, options
        self.geometry, self.encoded = geometry, encode(geometry)
        self.tracking = _Tracking()
        self.register_buffer("v", vector)

    def forward(self, weight: Tensor) -> Tensor:
        tracking = self.tracking
        if not self.training:
            if not tracking.prepared:
                # Not before the model's forward: what runs outside of layers passes for a part of the model.
                certify(tracking.together or [(self, weight)])
                for constraint, _ in tracking.together:
                    constraint.tracking.prepared = True
            assert tracking.certificate is not None
            scale = self.bound / tracking.certificate.upper
            return weight if scale >= 1.0 else _CertifiedScale.apply(weight, self, tracking.certificate, scale)
        if not tracking.prepared:
            track([(self, weight)])
        gradient = tracking.gradient
        assert gradient is not None
        with torch.autocast(weight.device.type, enabled=False):
            norm = gradient.norm_of(computable(weight.detach()))
            if _may_read(weight):
                value = float(norm)
                if abs(value - tracking.norm) > _JUMP * tracking.norm:
                    tracking.wait = 0
                tracking.norm = value
                if value <= self.bound:
                    return weight
                return _Scale.apply(weight, *gradient, value, self.bound / value, 1.0)
            above = (norm > self.bound).to(norm.dtype)
            return _Scale.apply(weight, *gradient, norm, (self.bound / norm).clamp(max=1.0), above)

    def due(self, weight: Tensor) -> bool:
        """Whether the vectors take a step in this forward."""
        gradient = self.tracking.gradient
        if gradient is None or gradient.left.device != weight.device or not _may_read(weight):
            return True
        if gradient.left.dtype != computing_dtype(weight):
            return True
        self.tracking.wait -= 1
        return self.tracking.wait <= 0

    def operator(self, weight: Tensor) -> Operator:
        """The layer's linear map with this weight."""
        return self.geometry.with_weight(weight.reshape(self.geometry.weight.shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.tracking = _Tracking()


def _may_read(weight: Tensor) -> bool:
    """Whether a number of a tensor may be read: it stops neither a GPU nor a compiler."""
    return weight.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def track(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """Steps of power iteration for these layers in training, by one operation for all that are iterated alike."""
    alike: dict[tuple[int, torch.device], list[tuple[NormConstraint, Tensor]]] = {}
    for constraint, weight in layers:
        alike.setdefault((constraint.iterations, weight.device), []).append((constraint, weight.detach()))
    for (iterations, _), group in alike.items():
        weights = [weight for _, weight in group]
        encoded = [number for constraint, _ in group for number in constraint.encoded]
        found = norm_gradients(weights, [constraint.v for constraint, _ in group], encoded, iterations)
        for place, (constraint, weight) in enumerate(group):
            vector, left, right = found[3 * place : 3 * place + 3]
            constraint.v.copy_(vector)
            gradient, before = NormGradient(left, right), constraint.tracking.gradient
            if _may_read(weight):
                _set_interval(constraint.tracking, computable(weight), before, gradient)
            constraint.tracking.gradient = gradient


def _set_interval(tracking: _Tracking, weight: Tensor, before: NormGradient | None, after: NormGradient) -> None:
    """Choose when the next step is due, by how much this one raised the norm."""
    if before is None or before.left.shape != after.left.shape or before.left.dtype != after.left.dtype:
        tracking.interval = 1
    else:
        with torch.autocast("cpu", enabled=False):
            old, new = float(before.norm_of(weight)), float(after.norm_of(weight))
        if new - old > _MOVING * new:
            tracking.interval = max(1, tracking.interval // 2)
        elif 0.0 <= new - old < _STEADY * new:
            tracking.interval = min(_LONGEST, 2 * tracking.interval)
    tracking.wait = tracking.interval


def certify(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """Certify the norms of layers in eval mode together, unless all weights are those that were certified last.

    Raises:
        ValueError: a weight holds NaN or infinite values; the message names the layer.
    """
    if all(_is_certified(constraint, weight.detach()) for constraint, weight in layers):
        return
    copies = [weight.detach().clone() for _, weight in layers]
    ops = [constraint.operator(copy) for (constraint, _), copy in zip(layers, copies, strict=True)]
    for (constraint, _), op in zip(layers, ops, strict=True):
        try:
            require_finite(op)
        except ValueError as error:
            raise ValueError(f"layer {constraint.name}: {error}") from None
    uppers = certified_uppers(ops, layers[0][0].options)
    for (constraint, _), copy, upper in zip(layers, copies, uppers, strict=True):
        constraint.tracking.certificate = _Certificate(copy, upper)


def _is_certified(constraint: NormConstraint, weight: Tensor) -> bool:
    if constraint.tracking.certificate is None:
        return False
    copy = constraint.tracking.certificate.weight
    return copy.device == weight.device and copy.dtype == weight.dtype and torch.equal(copy, weight)


class _Scale(torch.autograd.Function):
    """The weight times min(1, bound / norm), where the norm is <G, weight>."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, left: Tensor, right: Tensor, norm: Tensor | float, scale: Any, above: Any
    ) -> Tensor:
        scaled = weight * scale
        scaled = scaled.to(weight.dtype)
        ctx.save_for_backward(scaled, left, right, *(t for t in (norm, scale, above) if isinstance(t, Tensor)))
        ctx.numbers = () if isinstance(norm, Tensor) else (norm, scale, above)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, left, right, *numbers = ctx.saved_tensors
        norm, scale, above = numbers or ctx.numbers
        return _gradient(grad, scaled, NormGradient(left, right), norm, scale, above), None, None, None, None, None


class _CertifiedScale(torch.autograd.Function):
    """The weight times a certified number, with the gradient of bound / norm."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, constraint: NormConstraint, certificate: _Certificate, scale: float
    ) -> Tensor:
        scaled = weight * scale
        ctx.save_for_backward(scaled)
        ctx.constraint, ctx.certificate, ctx.scale = constraint, certificate, scale
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scaled,) = ctx.saved_tensors
        gradient, norm = ctx.certificate.gradient(ctx.constraint)
        return _gradient(grad, scaled, gradient, norm, ctx.scale, 1.0), None, None, None


def _gradient(
    grad: Tensor, scaled: Tensor, gradient: NormGradient, norm: Tensor | float, scale: Any, above: Any
) -> Tensor:
    """The gradient in the weight, from that in the scaled weight."""
    with torch.autocast(grad.device.type, enabled=False):
        given = computable(grad.contiguous())
        along = torch.dot(given.flatten(), computable(scaled).flatten())
        factor = (float(along) if isinstance(norm, float) else along) / norm * above
        found = given * scale
        gradient.subtract_from(found, factor)
        return found.to(grad.dtype)
