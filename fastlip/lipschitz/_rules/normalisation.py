"""Normalisations: LayerNorm and kin over groups of elements, softmax, and division by an L2 norm.

LayerNorm and kin map x to gamma (x - mean) / s + beta with s = sqrt(var + eps). The Jacobian is
gamma (I - n n^T / d) P / s with n the normalised values and P the projection that takes off the mean: its norm is at
most max|gamma| / s, and s at least sqrt(eps). Where bounds of x say that the variance is larger, so is the least s.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import largest_element
from fastlip.lipschitz._calls import Call, copied
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._intervals import EPS, Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rules.own_weights import by_statistics
from fastlip.lipschitz._steps import Step

#: Rounding of a few operations on numbers.
_ROUNDING = 1e-14
#: Rounds of bisection for the least variance.
_ROUNDS = 50


@dataclass(frozen=True, eq=False)
class Normalisation(Weighted):
    """x over its deviation in each group of elements, times a factor for each.

    Attributes:
        groups: brings the groups of [B, *shape] to rows, [B, groups, d].
        size: d, the elements of a group.
        eps: what is added to the variance.
        scale: largest magnitude of a factor.
        centred: whether the mean is taken off.
    """

    name: ClassVar[str] = "normalisation"
    groups: Callable[[Tensor], Tensor]
    size: int
    eps: float
    scale: float
    centred: bool = True

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        if self.scale == 0.0 or (self.centred and self.size == 1):
            return [0.0]
        (x,) = magnitudes
        variance = least_variance(self.groups(x.lower), self.groups(x.upper), self.centred)
        deviation = math.sqrt(self.eps + variance) * (1.0 - _ROUNDING)
        return [self.scale / deviation * (1.0 + _ROUNDING) if deviation > 0.0 else math.inf]


def least_variance(lower: Tensor, upper: Tensor, centred: bool) -> float:
    """Lower bound on the variance (the mean square, unless ``centred``) of any of several groups.

    The sum of squared distances to the mean is the least one to any number, so that it is at least the least over mu of
    the squared distances of mu from the elements' bounds: a convex function, whose slope gives a lower bound on it.

    Args:
        lower: lower bounds, [..., d] float64.
        upper: upper bounds.
        centred: whether the mean is taken off.
    """
    d = lower.shape[-1]
    if not lower.numel():
        return 0.0

    def outside(mu: Tensor) -> Tensor:
        return torch.where(lower > mu, lower - mu, torch.where(upper < mu, upper - mu, 0.0))

    slack = 1.0 - EPS * (4 * d + 64)
    if not centred:
        return max(0.0, (outside(torch.zeros_like(lower[..., :1])).square().sum(-1) / d).min().item() * slack)
    # Between these the least mu lies: below, all of the bounds are above it or contain it, and so on.
    low, high = upper.amin(-1, keepdim=True), lower.amax(-1, keepdim=True)
    if bool((low >= high).any()) or not bool(low.isfinite().all() & high.isfinite().all()):
        return 0.0
    for _ in range(_ROUNDS):
        mu = 0.5 * (low + high)
        rises = outside(mu).sum(-1, keepdim=True) < 0.0
        low, high = torch.where(rises, low, mu), torch.where(rises, mu, high)
    mu = 0.5 * (low + high)
    away = outside(mu)
    # Convex: the least is at least the value here, less the slope times how far away the least may be.
    slope = 2.0 * (away.sum(-1).abs() + EPS * d * away.abs().sum(-1))
    reach = (high - low).squeeze(-1) + 4.0 * EPS * mu.abs().squeeze(-1)
    value = away.square().sum(-1) * slack - slope * reach
    return max(0.0, value.min().item() / d * slack)


def _rows(axes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Brings axes, counted from the end, to the last one, [B, groups, d]."""

    def groups(t: Tensor) -> Tensor:
        count = len(axes)
        return t.movedim(tuple(axes), tuple(range(-count, 0))).flatten(-count).reshape(len(t), -1, _size(t, axes))

    return groups


def _size(t: Tensor, axes: Sequence[int]) -> int:
    return math.prod(t.shape[axis] for axis in axes)


def _normalised(
    call: Call,
    function: Callable[[Tensor], Tensor],
    axes: Sequence[int],
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    centred: bool = True,
    split: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """The step of a normalisation.

    Args:
        call: the call.
        function: the normalisation, with the constants from which the bound is computed.
        axes: over which mean and variance are taken, counted from the end, after ``split``.
        eps: what is added to the variance.
        weight: the factors, which broadcast to the output after ``split``.
        bias: the offsets, likewise.
        centred: whether the mean is taken off.
        split: brings [B, *shape] to a shape in which the groups are whole axes.
    """
    if not eps > 0.0:
        raise ValueError(f"{call.where}: {call.name} with eps {eps} has no Lipschitz constant")
    shape = call.sources[0].shape
    split_ = split or (lambda t: t)
    sample = split_(torch.zeros(1, *shape))
    scale = 1.0 if weight is None else largest_element(weight.detach().double().abs())
    if not math.isfinite(scale):
        raise ValueError(f"{call.where}: {call.name} has weights that are not finite")
    factor = Normalisation(lambda t: _rows(axes)(split_(t)), _size(sample, axes), eps, scale, centred)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        ends = Interval(split_(x.lower), split_(x.upper), x.norm)
        y = arithmetic.normalised(ends, axes, eps, centred=centred, weight=weight, bias=bias)
        return Interval(y.lower.reshape(x.lower.shape), y.upper.reshape(x.lower.shape), y.norm)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return function(x)

    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval)


def _arguments(call: Call, names: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """The arguments of a function by name.

    Raises:
        ValueError: one of those that follow the input depends on the model's input, or is not known here.
    """
    given = defaults | dict(zip(names, call.args, strict=False)) | call.kwargs
    later = {name: value for name, value in given.items() if name != names[0]}
    if len(call.args) > len(names) or not set(given) <= set(names) or not call.on_one:
        raise missing_rule(f"{call.name} with these arguments", call.where)
    if any(isinstance(value, fx.Node) for value in later.values()):
        raise missing_rule(f"{call.name} with parameters that depend on the input", call.where)
    return {name: copied(value) for name, value in later.items()}


def _layer_norm_step(
    call: Call, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Step:
    shape = tuple(normalized_shape)

    def function(x: Tensor) -> Tensor:
        return F.layer_norm(x, shape, _like(weight, x), _like(bias, x), eps)

    axes = range(-len(shape), 0)
    return _normalised(call, function, axes, eps, weight, bias)


def _like(constant: Tensor | None, x: Tensor) -> Tensor | None:
    return None if constant is None else constant.detach().to(x)


@builds(nn.LayerNorm)
def _layer_norm(call: Call) -> Step | None:
    m = call.target
    return _layer_norm_step(call, m.normalized_shape, m.weight, m.bias, m.eps) if len(call.sources) == 1 else None


@builds(F.layer_norm, torch.layer_norm)
def _functional_layer_norm(call: Call) -> Step | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    given = _arguments(call, names, weight=None, bias=None, eps=1e-5)
    return _layer_norm_step(call, given["normalized_shape"], given["weight"], given["bias"], given["eps"])


def _rms_norm_step(call: Call, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Step:
    shape = tuple(normalized_shape)
    # Torch takes the smallest step of the input's dtype; the model may be compared in float64.
    least = torch.finfo(torch.float64).eps if eps is None else eps

    def function(x: Tensor) -> Tensor:
        return F.rms_norm(x, shape, _like(weight, x), eps)

    return _normalised(call, function, range(-len(shape), 0), least, weight, centred=False)


@builds(nn.RMSNorm)
def _rms_norm(call: Call) -> Step | None:
    m = call.target
    return _rms_norm_step(call, m.normalized_shape, m.weight, m.eps) if len(call.sources) == 1 else None


@builds(F.rms_norm, torch.rms_norm)
def _functional_rms_norm(call: Call) -> Step | None:
    given = _arguments(call, ("input", "normalized_shape", "weight", "eps"), weight=None, eps=None)
    return _rms_norm_step(call, given["normalized_shape"], given["weight"], given["eps"])


def _group_norm_step(call: Call, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Step:
    shape = call.sources[0].shape
    if not call.alone:
        raise missing_rule(f"{call.name} of a tensor whose first axis is not the batch's", call.where)
    channels, rest = shape[0], shape[1:]

    def split(t: Tensor) -> Tensor:
        return t.reshape(len(t), groups, channels // groups, *rest)

    def per_channel(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().view(groups, channels // groups, *(1,) * len(rest))

    def function(x: Tensor) -> Tensor:
        return F.group_norm(x, groups, _like(weight, x), _like(bias, x), eps)

    axes = range(-1 - len(rest), 0)
    return _normalised(call, function, axes, eps, per_channel(weight), per_channel(bias), split=split)


@builds(nn.GroupNorm)
def _group_norm(call: Call) -> Step | None:
    m = call.target
    return _group_norm_step(call, m.num_groups, m.weight, m.bias, m.eps) if len(call.sources) == 1 else None


@builds(F.group_norm)
def _functional_group_norm(call: Call) -> Step | None:
    given = _arguments(call, ("input", "num_groups", "weight", "bias", "eps"), weight=None, bias=None, eps=1e-5)
    return _group_norm_step(call, given["num_groups"], given["weight"], given["bias"], given["eps"])


@builds(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(call: Call) -> Step | None:
    m = call.target
    if len(call.sources) != 1:
        return None
    axes_of_sample = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}
    axes = next(n for kind, n in axes_of_sample.items() if isinstance(m, kind))
    if len(call.sources[0].shape) != axes:
        raise ValueError(f"module {call.where}: {call.name} without a batch axis has no Lipschitz rule")
    if m.track_running_stats:
        return by_statistics(call, m.running_mean, m.running_var, m.weight, m.bias, m.eps)
    return _group_norm_step(call, call.shape[0], m.weight, m.bias, m.eps)


@builds(F.instance_norm)
def _functional_instance_norm(call: Call) -> Step | None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = _arguments(call, names, running_mean=None, running_var=None, weight=None, bias=None)
    given = {"use_input_stats": True, "eps": 1e-5} | given
    if not call.alone or len(call.shape) < 2:
        raise missing_rule(f"{call.name} without a batch axis", call.where)
    if given["use_input_stats"]:
        return _group_norm_step(call, call.shape[0], given["weight"], given["bias"], given["eps"])
    if given["running_mean"] is None or given["running_var"] is None:
        raise missing_rule(f"{call.name} without statistics", call.where)
    mean, variance = given["running_mean"], given["running_var"]
    return by_statistics(call, mean, variance, given["weight"], given["bias"], given["eps"])


def _softmax_step(call: Call, dim: int | None, *, log: bool) -> Step:
    rank = call.rank
    if dim is None or (dim % rank == 0 and call.alone):
        raise missing_rule(f"{call.name} along the batch axis, or one that torch chooses", call.where)
    axis = dim % rank - rank
    count = call.shape[axis]
    if log:
        # The Jacobian is I - 1 p^T, whose norm is convex in p and therefore largest where p is a unit vector.
        factor = math.sqrt(count) * (1.0 + _ROUNDING) if count > 1 else 0.0
        return Step(
            call.where, call.name, call.sources, factor, call.shape, apply=lambda x, *_, **__: x.log_softmax(axis)
        )
    # The Jacobian diag(p) - p p^T has row sums of magnitudes 2 p (1 - p).
    factor = 0.5 if count > 1 else 0.0
    module = nn.Softmax(axis)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        return arithmetic.softmax(x, axis)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.softmax(axis)

    sources = call.sources
    return Step(call.where, call.name, sources, factor, call.shape, module, apply=apply, interval=interval)


@builds(nn.Softmax, nn.LogSoftmax)
def _softmax_module(call: Call) -> Step | None:
    return _softmax_step(call, call.target.dim, log=isinstance(call.target, nn.LogSoftmax))


@builds(torch.softmax, F.softmax, torch.log_softmax, F.log_softmax, "softmax", "log_softmax")
def _softmax_function(call: Call) -> Step | None:
    given = _arguments(call, ("input", "dim", "dtype", "_stacklevel"), dim=None)
    if given.get("dtype") not in (None, call.source_dtype):
        raise missing_rule(f"{call.name} to another dtype", call.where)
    return _softmax_step(call, given["dim"], log="log" in call.name)


@dataclass(frozen=True, eq=False)
class Direction(Weighted):
    """Division by the L2 norm of each group, or by eps where that is larger: no group moves more than over that norm.

    Attributes:
        groups: brings the groups of [B, *shape] to rows, [B, groups, d].
        eps: the least divisor.
    """

    name: ClassVar[str] = "direction"
    groups: Callable[[Tensor], Tensor]
    eps: float

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        (x,) = magnitudes
        lower, upper = self.groups(x.lower), self.groups(x.upper)
        square = least_variance(lower, upper, centred=False) * lower.shape[-1]
        least = max(self.eps, math.sqrt(square)) * (1.0 - _ROUNDING)
        return [1.0 / least * (1.0 + _ROUNDING) if least > 0.0 else math.inf]


@builds(F.normalize)
def _direction(call: Call) -> Step | None:
    given = _arguments(call, ("input", "p", "dim", "eps", "out"), p=2.0, dim=1, eps=1e-12)
    rank = call.rank
    if given["p"] != 2.0 or not isinstance(given["dim"], int) or (given["dim"] % rank == 0 and call.alone):
        raise missing_rule(f"{call.name} with these arguments", call.where)
    axis, eps = given["dim"] % rank - rank, float(given["eps"])
    groups = _rows([axis])
    count = math.prod(call.shape) // max(call.shape[axis], 1)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        ones = torch.ones_like(x.lower)
        norm = x.norm.new_full((x.batch,), math.sqrt(count) * (1.0 + _ROUNDING))
        within = Interval(-ones * (1.0 + _ROUNDING), ones * (1.0 + _ROUNDING), norm)
        lower, upper = x.lower, x.upper
        least = torch.where(lower > 0.0, lower, torch.where(upper < 0.0, -upper, 0.0))
        size = arithmetic.EPS * (call.shape[axis] + 8)
        low = torch.linalg.vector_norm(least, dim=axis, keepdim=True) * (1.0 - size)
        high = torch.linalg.vector_norm(x.magnitude(), dim=axis, keepdim=True) * (1.0 + size)
        divisor = Interval(low.clamp_min(eps), high.clamp_min(eps))
        return arithmetic.divide(x, divisor).intersection(within)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.normalize(x, 2.0, axis, eps)

    factor = Direction(groups, eps)
    return Step(call.where, call.name, call.sources, factor, call.shape, apply=apply, interval=interval)


@builds(torch.linalg.vector_norm, torch.linalg.norm, torch.norm, "norm")
def _norm(call: Call) -> Step | None:
    """The L2 norm over some axes, which changes by no more than its argument."""
    order = {"norm": "p"}.get(call.name, "ord")
    given = _arguments(call, ("input", order, "dim", "keepdim", "out", "dtype"), dim=None, keepdim=False)
    dims = given["dim"]
    axes = [dims] if isinstance(dims, int) else list(dims or ())
    rank = len(call.sources[0].shape) + call.sources[0].alone
    matrix = call.name == "linalg_norm" and len(axes) == 2 and given.get(order) not in (None, "fro")
    ordinary = given.get(order, 2) in (None, 2, 2.0, "fro") and not matrix
    over_batch = call.sources[0].alone and any(axis % rank == 0 for axis in axes)
    if not ordinary or not axes or over_batch or given.get("dtype") is not None:
        raise missing_rule(f"{call.name} with these arguments", call.where)
    axes = [axis % rank - rank for axis in axes]
    keep = bool(given["keepdim"])
    count = math.prod(call.sources[0].shape[axis] for axis in axes)

    def apply(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.linalg.vector_norm(x, 2, axes, keep)

    def interval(x: Interval, *_: Any, **__: Any) -> Interval:
        least = torch.where(x.lower > 0.0, x.lower, torch.where(x.upper < 0.0, -x.upper, 0.0))
        slack = EPS * (count + 8)
        largest = apply(x.magnitude()) * (1.0 + slack) + 1e-300
        return Interval(apply(least) * (1.0 - slack), largest, x.norm)

    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=apply, interval=interval)
