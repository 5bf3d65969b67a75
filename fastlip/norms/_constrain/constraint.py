"""The parametrisation of a layer whose norm is kept below a bound, and the steps and certificates that it goes by."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fastlip.norms._constrain.certificates import Certificate, certified_uppers
from fastlip.norms._constrain.folded_batchnorm import folded_weight
from fastlip.norms._constrain.norm_gradients import (
    BETWEEN_WAVES,
    NormGradient,
    computable,
    computing_dtype,
    encode,
    gradient_like,
    norm_gradients,
    with_wave,
)
from fastlip.norms._constrain.scaling import CertifiedScale, EagerScale, Norm, Scale
from fastlip.norms._constrain.transforms import is_batched, is_eager, is_exported, outside_of_transforms, unwrapped
from fastlip.norms._models.restore import version_of
from fastlip.norms._operators.operator import Operator, require_finite
from fastlip.norms._options import NormOptions
from fastlip.norms._solvers.waves import Waves, has_waves

#: On a CPU a layer's vectors rest between steps. The interval from one to the next is doubled, up to so many forwards,
#: after so many times in a row that the steps raised the norm by less than a share of it; where they raise it by more
#: than the last share the interval is 1 again. In the first forwards, when weights move the fastest, it is no longer
#: than a share of their number.
_LONGEST, _IN_A_ROW, _STEADY, _MOVING, _SHARE = 64, 4, 6e-4, 1e-3, 1 / 16
#: Most steps, in multiples of ``iterations``, that are taken at once, and how often in one forward.
_MOST_AT_ONCE, _MOST_TURNS = 4, 4
#: Change of a norm since the vectors' last step after which they take one in the next forward; after which the interval
#: is 1 again, as training hardly changes a weight so much at once; and after which they take steps in this forward.
#: Along its vectors the norm is known: small changes say nothing of others.
_CHANGE, _LEAP, _JUMP = 2e-3, 1e-2, 0.1


class _Tracking:
    """What a constraint remembers from one forward to the next, beside its vectors.

    Attributes:
        gradient: of the norm in the weight; None until the first step.
        found: the norm after the last step: a float on a CPU, elsewhere and in compiled code a scalar tensor.
        norm: the norm that the last forward in training went by.
        used: the state of the layer in that forward, as :meth:`NormConstraint.state` gives it.
        rested: forwards since the last step, or as many as make the next one due.
        interval: forwards from one step to the next.
        forwards: since the first step.
        waves: of a convolution on a CPU, to see when one overtakes; None until the first look.
        looked: the number of forwards when this was looked at last.
        steady: how many times in a row steps hardly raised the norm.
        prepared: the state of the layer for which the model's forward, which is running, took the steps that were due
            or certified it. An interrupt may leave it behind.
        together: layers in eval mode that the model's forward, which is running, certifies with this one.
        certificate: what eval mode goes by.
        scale: what compiled code scales the weight by in eval mode, in the model's forward, which is running.
    """

    def __init__(self) -> None:
        self.gradient: NormGradient | None = None
        self.found: Tensor | float | None = None
        self.norm: Tensor | float = 0.0
        self.used: tuple[object, ...] | None = None
        self.rested, self.interval, self.steady = 0, 1, 0
        self.forwards, self.looked = 0, 0
        self.waves: Waves | None = None
        self.prepared: tuple[object, ...] | None = None
        self.together: list[tuple[NormConstraint, Tensor]] = []
        self.certificate: Certificate | None = None
        self.scale: Tensor | None = None

    def last_step(self) -> tuple[NormGradient, Tensor | float]:
        """The gradient of the norm, and the norm, after the last step."""
        assert self.gradient is not None
        assert self.found is not None
        return self.gradient, self.found

    def at_most(self, interval: int) -> int:
        """The interval, or a shorter one in the first forwards."""
        return min(interval, _LONGEST, max(1, int(self.forwards * _SHARE)))

    def set_interval(self, raised: float, place: int) -> None:
        """Choose when the next step is due, after one that raised the norm by this share of it."""
        self.rested = 0
        self.steady = self.steady + 1 if raised < _STEADY else 0
        if not raised < _MOVING:
            self.interval = 1
        elif self.steady == _IN_A_ROW:
            self.interval, self.steady = self.at_most(2 * self.interval), 0
            self.rested = place % self.interval  # so that not all layers of a model are due in the same forward


class NormConstraint(nn.Module):
    """The parametrisation: the weight, scaled so that its norm stays below the bound.

    Attributes:
        name: qualified name of the layer, or its class where no model is known.
        place: the layer's place among those that are constrained.
        of: how many these are.
        key: what compiled code finds the constraint by.
        v: the first two singular vectors so far, [2, Cin, *input_size], or [2, Cin] of what is a matrix.
    """

    v: Tensor
    place, of = 0, 1

    def __init__(
        self, name: str, geometry: Operator, vectors: Tensor, bound: float, iterations: int, options: NormOptions
    ) -> None:
        super().__init__()
        self.key = _keep(self)
        self.name, self.bound, self.iterations, self.options = name, bound, iterations, options
        self.geometry, self.encoded = geometry, encode(geometry)
        self.tracking = _Tracking()
        self.register_buffer("v", vectors)

    def forward(self, weight: Tensor) -> Tensor:
        self.require_one(weight)
        return self._in_training(weight) if self.training else self._in_eval(weight)

    def require_one(self, weight: Tensor) -> None:
        """Raise ValueError where ``vmap`` maps over several weights, or torch.export is at work."""
        if is_exported():
            raise ValueError(
                "a constrained model cannot be exported, as its bounds are computed anew whenever weights change; call "
                "unconstrain on it, or on a copy.deepcopy of it, before"
            )
        if is_batched(weight):
            raise ValueError(
                f"layer {self.name} is constrained, and cannot take several weights at once; call unconstrain before"
            )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the layer's weight is the weight to scale."""
        return weight

    def state(self, weight: Tensor) -> tuple[object, ...]:
        """What tells whether the layer is in the same mode and has the same numbers as before."""
        if torch.compiler.is_compiling():  # which holds for one forward
            return (self.training,)
        return (self.training, *((id(t), version_of(unwrapped(t))) for t in self.weights(weight)))

    def weights(self, weight: Tensor) -> list[Tensor]:
        """The weights that the norm depends on."""
        return [weight]

    def is_prepared(self, weight: Tensor) -> bool:
        """Whether the model's forward, which is running, has taken the steps that were due or certified the layer."""
        prepared, state = self.tracking.prepared, self.state(weight)
        return prepared is not None and prepared[: len(state)] == state

    def is_recomputed(self, weight: Tensor) -> bool:
        """Whether a backward pass runs, which computes again what the last forward did, in a checkpoint."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return False
        return self.tracking.used == self.state(weight)

    def _in_training(self, weight: Tensor) -> Tensor:
        tracking = self.tracking
        if not self.is_prepared(weight):
            if self.is_recomputed(weight):
                return self._scaled(weight, tracking.last_step()[0], tracking.norm)
            if self.due(weight):
                track([(self, weight)])
        tracking.norm, tracking.used = self._norm(weight), self.state(weight)
        return self._scaled(weight, tracking.last_step()[0], tracking.norm)

    def _norm(self, weight: Tensor) -> Tensor | float:
        """The norm to go by: a float on a CPU, of the weight as it is."""
        tracking = self.tracking
        gradient, found = tracking.last_step()
        if not (_may_read(weight) and tracking.rested):
            return found
        with outside_of_transforms():
            norm = gradient.number_of(computable(self.applied(weight)))
        change = abs(norm - float(found))
        if change > _CHANGE * norm and tracking.rested < tracking.interval:
            tracking.interval = 1 if change > _LEAP * norm else max(1, tracking.interval // 2)
            tracking.rested = tracking.interval  # due in the next forward
        if change <= _JUMP * norm:
            return norm
        track([(self, weight)])  # this is no training, but another weight
        return self.tracking.last_step()[1]

    def _scaled(self, weight: Tensor, gradient: NormGradient, norm: Tensor | float) -> Tensor:
        if isinstance(norm, float) and norm <= self.bound:
            return weight
        return self.scale(weight, gradient, norm)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.key = _keep(self)  # a copy's is its own

    def _in_eval(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._in_compiled_eval(weight)
        tracking = self.tracking
        if not self.is_prepared(weight) or tracking.certificate is None:
            # Not before the model's forward: what runs outside of layers passes for a part of the model.
            certify(tracking.together or [(self, weight)])
            for constraint, own in tracking.together:
                constraint.tracking.prepared = constraint.state(own)
        assert tracking.certificate is not None
        scale = tracking.certificate.scale(self.bound)
        return weight if scale >= 1.0 else self.certified_scale(weight, tracking.certificate, scale)

    def _in_compiled_eval(self, weight: Tensor) -> Tensor:
        """As in eval mode, by operations that the compiler does not look into."""
        found = self.tracking.scale
        if found is None:  # outside of the model's forward, after which nothing would be forgotten
            (found,) = certified_scales([weight.detach()], [self.applied(weight)], [self.key])
        scale = found.to(weight.dtype)
        if not torch.is_grad_enabled():
            return weight * scale
        left, right, norm = certified_gradient(weight.detach(), self.applied(weight), self.key)
        own = Norm.apply(self.mapped(weight), left, right, norm)
        factor = torch.where(scale < 1.0, norm / own, 1.0)  # 1, with a gradient
        return weight * (scale * factor.to(weight.dtype))

    def mapped(self, weight: Tensor) -> Tensor:
        """The weight of the linear map whose norm is bounded."""
        return weight

    def applied(self, weight: Tensor) -> Tensor:
        """The same, its numbers alone."""
        return unwrapped(weight.detach())

    def rounding(self, op: Operator, upper: float, eps: float) -> float:
        """By how much the map may exceed the one that was certified, beyond what scaling its weight adds."""
        return 0.0

    def scale(self, weight: Tensor, gradient: NormGradient, norm: Tensor | float) -> Tensor:
        """The weight times min(1, bound / norm); a float is above the bound."""
        function = EagerScale if is_eager() else Scale
        scaled: Tensor = function.apply(weight, *gradient, norm, self.bound)
        return scaled

    def certified_scale(self, weight: Tensor, certificate: Certificate, scale: float) -> Tensor:
        """The weight times a certified number, with the gradient of bound / norm."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight * scale
        scaled: Tensor = CertifiedScale.apply(weight, partial(certificate.gradient, self.v), scale)
        return scaled

    def due(self, weight: Tensor) -> bool:
        """Whether the vectors take a step in this forward."""
        gradient = self.tracking.gradient
        if gradient is None or gradient.left.device != weight.device or not _may_read(weight):
            return True
        if gradient.left.dtype != computing_dtype(weight):
            return True
        if gradient.left.is_inference() and not torch.is_inference_mode_enabled():
            return True  # autograd could not save it
        self.tracking.forwards += 1
        self.tracking.rested += 1
        return self.tracking.rested >= self.tracking.interval

    def most_steps(self, weight: Tensor, catch_up: bool) -> int:
        """How many steps to take at most: on a CPU more for the forwards that the vectors rested, and to catch up.

        Of a matrix they take little time, and its singular values cross each other often.
        """
        times = 1
        if _may_read(weight):
            most = catch_up or not self.geometry.kernel
            times = _MOST_AT_ONCE if most else min(max(self.tracking.rested, 1), _MOST_AT_ONCE)
        return times * self.iterations

    def vectors(self, weight: Tensor) -> Tensor:
        """The vectors to start from, and every few forwards on a CPU that of a wave that overtakes, if there is one."""
        tracking, op = self.tracking, self.operator(weight)
        due = tracking.forwards - tracking.looked >= tracking.at_most(BETWEEN_WAVES)
        if tracking.found is None or not (due and _may_read(weight) and has_waves(op)):
            return self.v
        tracking.looked = tracking.forwards
        tracking.waves = tracking.waves or Waves(op)
        return with_wave(self.v, tracking.waves, op, float(tracking.found))

    def operator(self, weight: Tensor) -> Operator:
        """The layer's linear map with this weight."""
        return self.geometry.with_weight(weight.reshape(self.geometry.weight.shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        given = state_dict.get(f"{prefix}v")
        if isinstance(given, Tensor) and given.shape != self.v.shape:
            state_dict[f"{prefix}v"] = self.v  # those of inputs of another size, with which this layer cannot begin
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
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

    def weights(self, weight: Tensor) -> list[Tensor]:
        own = self.layer._parameters.get("weight")
        return [weight] if own is None else [weight, own]

    def applied(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return unwrapped(self.mapped(weight))

    def scale(self, weight: Tensor, gradient: NormGradient, norm: Tensor | float) -> Tensor:
        own = Norm.apply(self.mapped(weight), *gradient, norm)
        # The backward pass of a number over the norm would square the norm's reciprocal, which may be out of range.
        return weight * (self.bound / own.clamp_min(self.bound)).to(weight.dtype)

    def certified_scale(self, weight: Tensor, certificate: Certificate, scale: float) -> Tensor:
        if not torch.is_grad_enabled():
            return weight * scale
        gradient, norm = certificate.gradient(self.v)
        own = Norm.apply(self.mapped(weight), *gradient, norm)
        return weight * (scale * (norm / own)).to(weight.dtype)  # norm / own is 1, with a gradient

    def rounding(self, op: Operator, upper: float, eps: float) -> float:
        # Operations that round the folded weight, and one or two that round the scaled factors, by channels.
        return 4.0 * torch.finfo(op.weight.dtype).eps * op.absolute_bound + 2.0 * eps * upper

    def mapped(self, weight: Tensor) -> Tensor:
        layer = self.layer
        if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"layer {self.name}: its weight is no parameter any more, and may be out of date")
        return folded_weight(*self._folded, weight, self._transposed, self.geometry.groups)


#: Constraints by their keys.
_KEPT: WeakValueDictionary[int, NormConstraint] = WeakValueDictionary()
_KEYS = itertools.count()


def _keep(constraint: NormConstraint) -> int:
    key = next(_KEYS)
    _KEPT[key] = constraint
    return key


def _kept(key: int) -> NormConstraint:
    constraint = _KEPT.get(key)
    if constraint is None:
        raise RuntimeError("the constrained model that this code was compiled for is not in this process any more")
    return constraint


@torch.library.custom_op("fastlip::certified_scales", mutates_args=())
def certified_scales(weights: Sequence[Tensor], applied: Sequence[Tensor], keys: Sequence[int]) -> list[Tensor]:
    """The numbers that bring layers' norms below their bounds, at most 1; float64 scalars.

    Args:
        weights: what is scaled by them.
        applied: the weights of the linear maps.
        keys: of the constraints.
    """
    layers = list(zip([_kept(key) for key in keys], weights, applied, strict=True))
    _certify_together(layers)
    scales = []
    for constraint, weight, _ in layers:
        assert constraint.tracking.certificate is not None
        scale = constraint.tracking.certificate.scale(constraint.bound)
        scales.append(torch.tensor(scale, dtype=torch.float64, device=weight.device))
    return scales


@certified_scales.register_fake
def _(weights: Sequence[Tensor], applied: Sequence[Tensor], keys: Sequence[int]) -> list[Tensor]:
    return [weight.new_empty((), dtype=torch.float64) for weight in weights]


@torch.library.custom_op("fastlip::certified_gradient", mutates_args=())
def certified_gradient(weight: Tensor, applied: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """``left`` and ``right`` of the gradient of the norm of a map whose norm is certified, and that norm, a scalar."""
    constraint = _kept(key)
    _certify_together([(constraint, weight, applied)])
    assert constraint.tracking.certificate is not None
    gradient, norm = constraint.tracking.certificate.gradient(constraint.v)
    return gradient.left.clone(), gradient.right.clone(), gradient.left.new_tensor(norm)


@certified_gradient.register_fake
def _(weight: Tensor, applied: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
    constraint = _kept(key)
    left, right = gradient_like(constraint.operator(applied))
    return left, right, left.new_empty(())


def _may_read(weight: Tensor) -> bool:
    """Whether a number of a tensor may be read: it stops neither a GPU nor a compiler."""
    return weight.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def track(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """Krylov steps for these layers in training, by one operation for all that take as many.

    On a CPU layers whose norm has moved take more of them.
    """
    with outside_of_transforms():
        moving = [(constraint, constraint.applied(weight)) for constraint, weight in layers]
        for turn in range(_MOST_TURNS):
            raised = _take_steps(moving, catch_up=turn > 0)
            moving = [pair for pair, share in zip(moving, raised, strict=True) if not share < _MOVING]
            if not moving:
                break


def _take_steps(layers: Sequence[tuple[NormConstraint, Tensor]], catch_up: bool) -> list[float]:
    """Krylov steps; returns the shares by which they raised the norms, 0 where no number may be read."""
    alike: dict[tuple[int, int, torch.device], list[int]] = {}
    for place, (constraint, weight) in enumerate(layers):
        most = constraint.most_steps(weight, catch_up)
        alike.setdefault((constraint.iterations, most, weight.device), []).append(place)
    shares = [0.0] * len(layers)
    for (steps, most, _), places in alike.items():
        weights = [layers[i][1] for i in places]
        vectors = [layers[i][0].vectors(layers[i][1]) for i in places]
        encoded = [number for i in places for number in layers[i][0].encoded]
        found = norm_gradients(weights, vectors, encoded, steps, most)
        for n, (place, weight) in enumerate(zip(places, weights, strict=True)):
            constraint = layers[place][0]
            new, norms, left, right = found[4 * n : 4 * n + 4]
            constraint.v.copy_(new)
            tracking = constraint.tracking
            tracking.gradient, tracking.found = NormGradient(left, right), norms[1]
            if _may_read(weight):
                before, after = norms.tolist()
                tracking.found = after
                shares[place] = (after - before) / after if after > 0.0 else 0.0
                # Of a norm of 0 nothing is known that could follow the weight.
                tracking.set_interval(shares[place] if after > 0.0 else math.inf, constraint.place)
    return shares


def certify(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """Certify the norms of layers in eval mode together, unless all weights are those that were certified last.

    Those that were constrained by different calls, with options of their own, are certified apart.

    Raises:
        ValueError: a weight holds NaN or infinite values, or the bound is smaller than what its dtype can tell apart;
            the message names the layer.
    """
    with outside_of_transforms():
        _certify_together([(constraint, weight, constraint.applied(weight)) for constraint, weight in layers])


def certify_in_compiled_code(layers: Sequence[tuple[NormConstraint, Tensor]]) -> None:
    """The same by one operation, in the compiled forward of a model that forgets the scales in the end."""
    weights = [weight.detach() for _, weight in layers]
    applied = [constraint.applied(weight) for constraint, weight in layers]
    scales = certified_scales(weights, applied, [constraint.key for constraint, _ in layers])
    for (constraint, _), scale in zip(layers, scales, strict=True):
        constraint.tracking.scale = scale


def _certify_together(layers: Sequence[tuple[NormConstraint, Tensor, Tensor]]) -> None:
    """:func:`certify`, given what is scaled and the weights of the maps as well."""
    by_call: dict[int, list[tuple[NormConstraint, Tensor, Tensor]]] = {}
    for layer in layers:
        by_call.setdefault(id(layer[0].options), []).append(layer)
    for own in by_call.values():
        if not all(_is_certified(*layer) for layer in own):
            constraint, _, applied = own[0]
            # Fewer than were constrained together have their share of what may fail.
            share = min(1.0, len(own) / constraint.of)
            failure = (1.0 - constraint.options.resolved([applied]).confidence) * share
            _certify(own, replace(constraint.options, confidence=1.0 - failure))


def _certify(layers: Sequence[tuple[NormConstraint, Tensor, Tensor]], options: NormOptions) -> None:
    """Certify the norms of layers, given what is scaled and the weights of their maps."""
    ops = [constraint.operator(applied.clone()) for constraint, _, applied in layers]
    for (constraint, _, _), op in zip(layers, ops, strict=True):
        try:
            require_finite(op)
        except ValueError as error:
            raise ValueError(f"layer {constraint.name}: {error}") from None
    uppers = certified_uppers(ops, options)
    for (constraint, weight, _), op, upper in zip(layers, ops, uppers, strict=True):
        rounding = constraint.rounding(op, upper, torch.finfo(weight.dtype).eps)
        certificate = Certificate(op, upper + rounding, weight.dtype)
        if not certificate.scale(constraint.bound) > 0.0:
            raise ValueError(f"layer {constraint.name}: no weight in {weight.dtype} is small enough for its bound")
        constraint.tracking.certificate = certificate


def _is_certified(constraint: NormConstraint, weight: Tensor, applied: Tensor) -> bool:
    certificate = constraint.tracking.certificate
    return certificate is not None and certificate.holds_for(weight, applied)
