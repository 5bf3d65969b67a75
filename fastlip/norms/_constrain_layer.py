"""The parametrisation of one layer among many whose norms are kept below a bound together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fastlip.norms._constrain_norm import certified_uppers, same_weight, settled_vector
from fastlip.norms._folded_batchnorm import folded_weight
from fastlip.norms._norm_gradients import NormGradient, computable, computing_dtype, encode, norm_gradients
from fastlip.norms._operators.operator import Operator, require_finite
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._options import NormOptions

#: On a CPU a layer's vectors rest between steps. The interval from one to the next is doubled, up to so many forwards,
#: after so many times in a row that the steps raised the norm by less than a share of it; where they raise it by more
#: than the last share the interval is 1 again.
_LONGEST, _IN_A_ROW, _STEADY, _MOVING = 16, 4, 6e-4, 1e-3
#: Most steps, in multiples of ``iterations``, that are taken at once, and how often in one forward.
_MOST_AT_ONCE, _MOST_TURNS = 4, 4
#: Change of a norm since the vectors' last step after which they take one in the next forward, and in this one.
_CHANGE, _JUMP = 2e-3, 0.1


class _Certificate:
    """A weight [Cout, Cin / groups, *kernel], and the upper side of its norm, which what is scaled rounds by eps."""

    def __init__(self, weight: Tensor, upper: float, eps: float) -> None:
        self.weight, self.upper, self.eps = weight, upper, eps
        self._gradient: tuple[NormGradient, float] | None = None

    def gradient(self, constraint: "NormConstraint") -> tuple[NormGradient, float]:
        """The gradient of the weight's norm, and that norm, by power iteration until it stands still."""
        if self._gradient is None:
            weight = computable(self.weight)
            convolution = TorchOperator(constraint.geometry, constraint.operator(weight).weight)
            vector = settled_vector(convolution, constraint.v[0].to(weight.dtype))
            vectors = torch.stack([vector, constraint.v[1].to(weight.dtype)])
            _, norms, left, right = norm_gradients([weight], [vectors], constraint.encoded, 4)
            self._gradient = NormGradient(left, right), float(norms[1])
        return self._gradient


class _Tracking:
    """What a constraint remembers from one forward to the next, beside its vector.

    Attributes:
        gradient: of the norm in the weight; None until the first step.
        found: the norm after the last step, a scalar.
        norm: the norm that the last forward in training found on a CPU.
        rested: forwards since the last step.
        interval: forwards from one step to the next.
        steady: how many times in a row steps hardly raised the norm.
        prepared: whether the model's forward is running, and took the steps that are due, or certified the layer.
        together: layers in eval mode that the model's forward, which is running, certifies with this one.
        certificate: what eval mode goes by.
    """

    def __init__(self) -> None:
        self.gradient: NormGradient | None = None
        self.found: Tensor | None = None
        self.norm = 0.0
        self.rested, self.interval, self.steady = 0, 1, 0
        self.prepared = False
        self.together: list[tuple[NormConstraint, Tensor]] = []
        self.certificate: _Certificate | None = None

    def last_step(self) -> tuple[NormGradient, Tensor]:
        """The gradient of the norm, and the norm, after the last step."""
        assert self.gradient is not None
        assert self.found is not None
        return self.gradient, self.found

    def set_interval(self, raised: float, place: int) -> None:
        """Choose when the next step is due, after one that raised the norm by this share of it."""
        self.rested = 0
        self.steady = self.steady + 1 if raised < _STEADY else 0
        if not raised < _MOVING:
            self.interval = 1
        elif self.steady == _IN_A_ROW:
            self.interval, self.steady = min(_LONGEST, 2 * self.interval), 0
            self.rested = place % self.interval  # so that not all layers of a model are due in the same forward


class NormConstraint(nn.Module):
    """The parametrisation: the weight, scaled so that its norm stays below the bound.

    Attributes:
        name: qualified name of the layer.
        place: the layer's place among those that are constrained.
        v: the first two singular vectors so far, [2, Cin, *input_size], or [2, Cin] of what is a matrix.
    """

    v: Tensor
    place = 0

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
            return weight if scale >= 1.0 else self.certified_scale(weight, tracking.certificate, scale)
        if not tracking.prepared:
            track([(self, weight)])
        gradient, norm = tracking.last_step()
        if not _may_read(weight):
            return self.scale(weight, gradient, norm)
        if tracking.rested:
            with torch.autocast(weight.device.type, enabled=False):
                found, norm = norm, gradient.norm_of(computable(self.applied(weight)))
            change = abs(norm - found)
            if change > _CHANGE * norm:
                tracking.interval = 1
            if not change <= _JUMP * norm:  # this is no training, but another weight
                track([(self, weight)])
                gradient, norm = tracking.last_step()
        tracking.norm = float(norm)
        if tracking.norm <= self.bound:
            return weight
        return self.scale(weight, gradient, tracking.norm)

    def applied(self, weight: Tensor) -> Tensor:
        """The weight of the linear map whose norm is bounded, detached."""
        return weight.detach()

    def rounding(self, op: Operator, upper: float, eps: float) -> float:
        """By how much the map may exceed the one that was certified, beyond what scaling its weight adds."""
        return 0.0

    def scale(self, weight: Tensor, gradient: NormGradient, norm: Tensor | float) -> Tensor:
        """The weight times min(1, bound / norm); a float is above the bound."""
        return _Scale.apply(weight, *gradient, norm, self.bound)

    def certified_scale(self, weight: Tensor, certificate: _Certificate, scale: float) -> Tensor:
        """The weight times a certified number, with the gradient of bound / norm."""
        return _CertifiedScale.apply(weight, self, certificate, scale)

    def due(self, weight: Tensor) -> bool:
        """Whether the vectors take a step in this forward."""
        gradient = self.tracking.gradient
        if gradient is None or gradient.left.device != weight.device or not _may_read(weight):
            return True
        if gradient.left.dtype != computing_dtype(weight):
            return True
        if gradient.left.is_inference() and not torch.is_inference_mode_enabled():
            return True  # autograd could not save it
        self.tracking.rested += 1
        return self.tracking.rested >= self.tracking.interval

    def steps(self, weight: Tensor, catch_up: bool) -> int:
        """How many steps to take at once: on a CPU more for the forwards that the vectors rested, and to catch up."""
        times = 1
        if _may_read(weight):
            times = _MOST_AT_ONCE if catch_up else min(max(self.tracking.rested, 1), _MOST_AT_ONCE)
        return times * self.iterations

    def operator(self, weight: Tensor) -> Operator:
        """The layer's linear map with this weight."""
        return self.geometry.with_weight(weight.reshape(self.geometry.weight.shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.tracking = _Tracking()


class FoldedConstraint(NormConstraint):
    """The parametrisation of a BatchNorm's weight, scaled so that the norm of the layer before it, with it, is bounded.

    In training mode a BatchNorm divides by the deviation of the batch, so that scaling the layer's own weight would
    change nothing but the statistics.
    """

    def __init__(
        self,
        name: str,
        geometry: Operator,
        vectors: Tensor,
        bound: float,
        iterations: int,
        options: NormOptions,
        layer: nn.Module,
        batchnorm: _BatchNorm,
        transposed: bool,
    ) -> None:
        super().__init__(name, geometry, vectors, bound, iterations, options)
        # In a tuple the modules are none of this one's own.
        self._folded, self._transposed = (layer, batchnorm), transposed

    @property
    def layer(self) -> nn.Module:
        """The layer in front of the BatchNorm."""
        return self._folded[0]

    def applied(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return self._fold(weight)

    def scale(self, weight: Tensor, gradient: NormGradient, norm: Tensor | float) -> Tensor:
        own = _Norm.apply(self._fold(weight), *gradient, norm)
        # The backward pass of a number over the norm would square the norm's reciprocal, which may be out of range.
        return weight * (self.bound / own.clamp_min(self.bound)).to(weight.dtype)

    def certified_scale(self, weight: Tensor, certificate: _Certificate, scale: float) -> Tensor:
        if not torch.is_grad_enabled():
            return weight * scale
        gradient, norm = certificate.gradient(self)
        own = _Norm.apply(self._fold(weight), *gradient, norm)
        return weight * (scale * (norm / own)).to(weight.dtype)  # norm / own is 1, with a gradient

    def rounding(self, op: Operator, upper: float, eps: float) -> float:
        # Operations that round the folded weight, and one or two that round the scaled factors, by channels.
        return 4.0 * torch.finfo(op.weight.dtype).eps * op.absolute_bound + 2.0 * eps * upper

    def _fold(self, weight: Tensor) -> Tensor:
        layer = self.layer
        if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"layer {self.name}: its weight is no parameter any more, and may be out of date")
        return folded_weight(*self._folded, weight, self._transposed, self.geometry.groups)


def _may_read(weight: Tensor) -> bool:
    """Whether a number of a tensor may be read: it stops neither a GPU nor a compiler."""
    return weight.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def track(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """Krylov steps for these layers in training, by one operation for all that take as many.

    On a CPU layers whose norm has moved take more of them.
    """
    moving = [(constraint, constraint.applied(weight)) for constraint, weight in layers]
    for turn in range(_MOST_TURNS):
        raised = _take_steps(moving, catch_up=turn > 0)
        moving = [pair for pair, share in zip(moving, raised, strict=True) if not share < _MOVING]
        if not moving:
            break


def _take_steps(layers: Sequence[tuple[NormConstraint, Tensor]], catch_up: bool) -> list[float]:
    """Krylov steps; returns the shares by which they raised the norms, 0 where no number may be read."""
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for place, (constraint, weight) in enumerate(layers):
        alike.setdefault((constraint.steps(weight, catch_up), weight.device), []).append(place)
    shares = [0.0] * len(layers)
    for (steps, _), places in alike.items():
        weights, vectors = [layers[i][1] for i in places], [layers[i][0].v for i in places]
        encoded = [number for i in places for number in layers[i][0].encoded]
        found = norm_gradients(weights, vectors, encoded, steps)
        for n, (place, weight) in enumerate(zip(places, weights, strict=True)):
            constraint = layers[place][0]
            new, norms, left, right = found[4 * n : 4 * n + 4]
            constraint.v.copy_(new)
            constraint.tracking.gradient, constraint.tracking.found = NormGradient(left, right), norms[1]
            if _may_read(weight):
                before, after = norms.tolist()
                shares[place] = (after - before) / after if after > 0.0 else 0.0
                # Of a norm of 0 nothing is known that could follow the weight.
                constraint.tracking.set_interval(shares[place] if after > 0.0 else math.inf, constraint.place)
    return shares


def certify(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """Certify the norms of layers in eval mode together, unless all weights are those that were certified last.

    Raises:
        ValueError: a weight holds NaN or infinite values; the message names the layer.
    """
    weights = [constraint.applied(weight) for constraint, weight in layers]
    if all(_is_certified(*pair, applied) for pair, applied in zip(layers, weights, strict=True)):
        return
    copies = [weight.clone() for weight in weights]
    ops = [constraint.operator(copy) for (constraint, _), copy in zip(layers, copies, strict=True)]
    for (constraint, _), op in zip(layers, ops, strict=True):
        try:
            require_finite(op)
        except ValueError as error:
            raise ValueError(f"layer {constraint.name}: {error}") from None
    uppers = certified_uppers(ops, layers[0][0].options)
    for (constraint, weight), op, upper in zip(layers, ops, uppers, strict=True):
        eps = torch.finfo(weight.dtype).eps
        constraint.tracking.certificate = _Certificate(op.weight, upper + constraint.rounding(op, upper, eps), eps)


def _is_certified(constraint: NormConstraint, weight: Tensor, applied: Tensor) -> bool:
    certificate = constraint.tracking.certificate
    if certificate is None or torch.finfo(weight.dtype).eps > certificate.eps:
        return False
    return same_weight(certificate.weight, applied)


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
        norm = norms[0] if norms else ctx.norm
        with torch.autocast(grad.device.type, enabled=False):
            found = NormGradient(left, right).through_scale(computable(grad), computable(scaled), norm, ctx.bound)
        return found.to(grad.dtype), None, None, None, None


class _Norm(torch.autograd.Function):
    """A norm that is known, with its gradient G in the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor, norm: Tensor | float) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.shape = weight.shape
        return norm.to(weight.dtype, copy=True) if isinstance(norm, Tensor) else weight.new_tensor(norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        product = left @ right if right.numel() else left
        return (grad * product).view(ctx.shape).to(grad.dtype), None, None, None


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
        with torch.autocast(grad.device.type, enabled=False):
            found = gradient.through_scale(computable(grad), computable(scaled), norm, norm * ctx.scale)
        return found.to(grad.dtype), None, None, None
