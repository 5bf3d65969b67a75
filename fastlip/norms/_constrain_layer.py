"""The parametrisation of one layer among many whose norms are kept below a bound together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlip.norms._constrain_norm import certified_uppers, same_weight, settled_vector
from fastlip.norms._norm_gradients import NormGradient, computable, computing_dtype, encode, norm_gradients
from fastlip.norms._operators.operator import Operator, require_finite
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._options import NormOptions

#: On a CPU a layer's vectors rest between steps. The interval from one to the next is doubled, up to so many forwards,
#: after so many steps in a row that raised the norm by less than a share of it; a step that raises it by more than the
#: last share brings the interval back to 1, and is followed by others at once.
_LONGEST, _IN_A_ROW, _STEADY, _MOVING = 8, 4, 3e-4, 1e-3
#: Most steps that a layer's vectors take at once to catch up.
_MOST_AT_ONCE = 10
#: Change of a norm since the vectors' last step after which they take one in the next forward.
_CHANGE = 2e-3


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
            vector = settled_vector(convolution, constraint.v[0].to(weight.dtype))
            vectors = torch.stack([vector, constraint.v[1].to(weight.dtype)])
            _, left, right = norm_gradients([weight], [vectors], constraint.encoded, 1)
            found = NormGradient(left, right)
            self._gradient = found, float(found.norm_of(weight))
        return self._gradient


class _Tracking:
    """What a constraint remembers from one forward to the next, beside its vector.

    Attributes:
        gradient: of the norm in the weight; None until the first step.
        norm: the norm that the last forward in training found on a CPU.
        stepped: the same of the forward in which the vectors took their last step.
        wait: forwards until the vectors' next step.
        interval: forwards from one step to the next.
        steady: number of steps in a row that hardly raised the norm.
        prepared: whether the model's forward is running, and took the steps that are due, or certified the layer.
        together: layers in eval mode that the model's forward, which is running, certifies with this one.
        certificate: what eval mode goes by.
    """

    def __init__(self) -> None:
        self.gradient: NormGradient | None = None
        self.norm = self.stepped = 0.0
        self.wait, self.interval, self.steady = 0, 1, 0
        self.prepared = False
        self.together: list[tuple[NormConstraint, Tensor]] = []
        self.certificate: _Certificate | None = None


class NormConstraint(nn.Module):
    """The weight, scaled so that its norm stays below the bound.

    Attributes:
        name: qualified name of the layer.
        v: the first two singular vectors so far, [2, Cin, *input_size], or [2, Cin] of what is a matrix.
    """

    v: Tensor

    def __init__(
        self, name: str, geometry: Operator, vectors: Tensor, bound: float, iterations: int, options: NormOptions
    ) -> None:
        super().__init__()
        self.name, self.bound, self.iterations, self.options = name, bound, iterations, options
        self.geometry, self.encoded = geometry, encode(geometry)
        self.tracking = _Tracking()
        self.register_buffer("v", vectors)

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
                if tracking.wait == tracking.interval:  # right after a step
                    tracking.stepped = value
                if abs(value - tracking.stepped) > _CHANGE * value:
                    tracking.wait = 0
                tracking.norm = value
                if value <= self.bound:
                    return weight
                return _Scale.apply(weight, *gradient, value, self.bound)
            return _Scale.apply(weight, *gradient, norm, self.bound)

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
    """Steps of power iteration for these layers in training, by one operation for all that are iterated alike.

    On a CPU layers whose norm has moved take more of them.
    """
    moving = [(constraint, weight.detach()) for constraint, weight in layers]
    for _ in range(_MOST_AT_ONCE):
        raised = _take_steps(moving)
        moving = [pair for pair, share in zip(moving, raised, strict=True) if not share < _MOVING]
        if not moving:
            break


def _take_steps(layers: Sequence[tuple[NormConstraint, Tensor]]) -> list[float]:
    """Steps of power iteration; returns the shares by which they raised the norms, 0 where no number may be read."""
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for place, (constraint, weight) in enumerate(layers):
        alike.setdefault((constraint.iterations, weight.device), []).append(place)
    shares = [0.0] * len(layers)
    for (iterations, _), places in alike.items():
        weights, vectors = [layers[i][1] for i in places], [layers[i][0].v for i in places]
        encoded = [number for i in places for number in layers[i][0].encoded]
        found = norm_gradients(weights, vectors, encoded, iterations)
        for n, (place, weight) in enumerate(zip(places, weights, strict=True)):
            constraint = layers[place][0]
            new, left, right = found[3 * n : 3 * n + 3]
            constraint.v.copy_(new)
            gradient, before = NormGradient(left, right), constraint.tracking.gradient
            if _may_read(weight):
                shares[place] = _raised(computable(weight), before, gradient)
                _set_interval(constraint.tracking, shares[place])
            constraint.tracking.gradient = gradient
    return shares


def _raised(weight: Tensor, before: NormGradient | None, after: NormGradient) -> float:
    """The share by which a step raised the norm; 0 for the first one, whose vectors come from the certified solver."""
    if before is None or before.left.shape != after.left.shape or before.left.dtype != after.left.dtype:
        return 0.0
    with torch.autocast("cpu", enabled=False):
        old, new = float(before.norm_of(weight)), float(after.norm_of(weight))
    return (new - old) / new if new > 0.0 else 0.0


def _set_interval(tracking: _Tracking, raised: float) -> None:
    """Choose when the next step is due."""
    tracking.steady = tracking.steady + 1 if abs(raised) < _STEADY else 0
    if not raised < _MOVING:
        tracking.interval = 1
    elif tracking.steady == _IN_A_ROW:
        tracking.interval, tracking.steady = min(_LONGEST, 2 * tracking.interval), 0
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
    certificate = constraint.tracking.certificate
    return certificate is not None and same_weight(certificate.weight, weight)


class _Scale(torch.autograd.Function):
    """The weight times min(1, bound / norm), where the norm is <G, weight>; a number, or a tensor that is not read."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor, norm: Tensor | float, bound: float) -> Tensor:
        scale = (bound / norm).clamp(max=1.0) if isinstance(norm, Tensor) else bound / norm
        scaled = (weight * scale).to(weight.dtype)
        ctx.save_for_backward(scaled, left, right, *([norm] if isinstance(norm, Tensor) else []))
        ctx.norm, ctx.bound = norm if isinstance(norm, float) else None, bound
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, left, right, *norms = ctx.saved_tensors
        given = computable(grad.contiguous())
        with torch.autocast(grad.device.type, enabled=False):
            along = torch.dot(given.flatten(), computable(scaled).flatten()) / ctx.bound
            factor: Tensor | float = torch.where(norms[0] > ctx.bound, along, 0.0) if norms else float(along)
            scale = (ctx.bound / norms[0]).clamp(max=1.0) if norms else ctx.bound / ctx.norm
            found = NormGradient(left, right).subtracted_from(given, factor).mul_(scale)
        return found.to(grad.dtype), None, None, None, None


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
        given = computable(grad.contiguous())
        with torch.autocast(grad.device.type, enabled=False):
            along = torch.dot(given.flatten(), computable(scaled).flatten())
            found = gradient.subtracted_from(given, float(along) / (norm * ctx.scale)).mul_(ctx.scale)
        return found.to(grad.dtype), None, None, None
