"""Interval arithmetic: bounds of what a step computes from bounds of what it reads, rounded outwards.

The bounds hold for the numbers that the step's formula defines, in exact arithmetic on the layers' weights as they are
stored. What is computed here in float64 is widened by the most that its own rounding, including underflow, can change.
Linear maps work on centre and radius: A (c +- r) = A c +- |A| r (S. M. Rump, "Fast and parallel interval arithmetic",
BIT 39, 1999).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.lipschitz._intervals import EPS, INF, TINY, Interval, as_rows, down, up, upper_norm
from fastlip.norms import Operator
from fastlip.norms._operators.modules import keeps_forward
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._solvers.float64_rounding import reduction_length

#: Relative error of a few operations, or of an elementary function of torch in float64.
_FEW = 16.0 * EPS
#: Relative radius up to which a domain is a point but for rounding.
_POINT = 1e-9
#: Above what a norm can lose by squares that vanish.
_LOST = 1e-150


def through_operator(
    operator: Operator, x: Interval, bias: Tensor | None = None, *, transposed: bool = False
) -> Interval:
    """A linear layer, or its adjoint where ``transposed``; ``bias`` is [Cout].

    An element is also bounded by its row's norm times the norm of the input, which is less behind a normalisation.
    """
    weight = operator.weight.detach().double()

    def apply(w: Tensor, t: Tensor) -> Tensor:
        if not operator.kernel and operator.groups == 1:
            return torch.nn.functional.linear(t, w)
        by_torch = TorchOperator(operator, w)
        return by_torch.adjoint(t) if transposed else by_torch.forward(t)

    matrix = not operator.kernel and operator.groups == 1

    # Scaled, so that no square that counts leaves the range of float64.
    size = weight.abs().amax().clamp(TINY, 1e300) if weight.numel() else weight.new_ones(())
    rounding = 1.0 + _FEW * reduction_length(operator)

    def row_norms() -> Tensor:
        if matrix:  # the same for all vectors along further axes
            rows = torch.linalg.vector_norm(weight / size, dim=1)
        else:
            rows = apply((weight / size).square(), torch.ones_like(x.lower[:1])).sqrt()
        return rows * size * rounding + _LOST * size + TINY

    def magnitudes(t: Tensor) -> Tensor:
        if not matrix or len(t) == 1:
            return apply(weight.abs(), t)
        # A domain that is a point has nothing but rounding here: rows' norms times that of t are enough for it.
        largest = as_rows(x.magnitude()).amax(1)
        point = (as_rows(t).amax(1) <= _POINT * largest) & largest.isfinite()
        lengths = torch.linalg.vector_norm(t, dim=-1, keepdim=True) * rounding + _LOST
        spread = lengths * row_norms()
        if not bool(point.all()):
            spread[~point] = apply(weight.abs(), t[~point])
        return spread

    y = linear(
        lambda t: apply(weight, t),
        magnitudes,
        x,
        reduction_length(operator),
        reached=lambda t: apply((weight != 0.0).double(), t) > 0.5,
    )
    if operator.padding_mode == "zeros" and bool((x.norm < INF).any()):
        rows = row_norms()
        rows = rows.expand(1, *y.shape) if matrix else rows
        reach = up(rows * x.norm.view(-1, *(1,) * (rows.dim() - 1)))
        y = Interval(torch.maximum(y.lower, -reach), torch.minimum(y.upper, reach))
    if bias is None:
        return y
    return shift(y, bias if matrix else bias.view(-1, *(1,) * (y.lower.dim() - 2)))


def linear(
    apply: Callable[[Tensor], Tensor],
    magnitudes: Callable[[Tensor], Tensor],
    x: Interval,
    terms: int,
    reached: Callable[[Tensor], Tensor] | None = None,
) -> Interval:
    """A linear map.

    Args:
        apply: the map, [B, *shape] to [B, *other].
        magnitudes: the map whose coefficients are the magnitudes of those of ``apply``.
        x: bounds of its input.
        terms: number of products in the longest sum that is one element of the output.
        reached: which outputs read any of the inputs that are 1 rather than 0; by default those where ``magnitudes``
            is positive.
    """
    centre, radius = x.centre_and_radius()
    unknown = ~radius.isfinite()
    some = bool(unknown.any())
    if some:
        radius, centre = torch.where(unknown, 0.0, radius), torch.where(unknown, 0.0, centre)
    relative = 1.01 * (terms + 4) * EPS
    middle = apply(centre)
    # The error of a sum of products (Higham 2002, section 3.1) is one of the sum of their magnitudes; it goes into the
    # radius. Each product and each input's own share may underflow.
    spread = magnitudes(radius + relative * centre.abs() + TINY) * (1.0 + relative) + 4.0 * terms * TINY
    lower, upper = down(middle - spread), up(middle + spread)
    lost = ~(middle.isfinite() & spread.isfinite())
    if some:
        hit = unknown.double()
        lost |= magnitudes(hit) > 0.0 if reached is None else reached(hit)
    return Interval(torch.where(lost, -INF, lower), torch.where(lost, INF, upper))


def monotone_linear(apply: Callable[[Tensor], Tensor], x: Interval, terms: int) -> Interval:
    """A linear map with coefficients >= 0 only, such as an average: applied to both ends."""
    relative = 1.01 * (terms + 4) * EPS
    slack = relative * apply(torch.where(x.magnitude().isfinite(), x.magnitude(), 0.0)) + 4.0 * terms * TINY
    return Interval(down(apply(x.lower) - slack), up(apply(x.upper) + slack))


def moved(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    """What a function that only moves or drops values, or fills in zeros, does to intervals among its arguments."""

    def apply(*args: Any, **kwargs: Any) -> Interval:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Interval)]
        (x,) = given

        def end(t: Tensor) -> Tensor:
            chosen = [t if isinstance(a, Interval) else a for a in args]
            return function(*chosen, **{k: t if isinstance(a, Interval) else a for k, a in kwargs.items()})

        return Interval(end(x.lower), end(x.upper), x.norm)

    return apply


def shift(x: Interval, offset: Tensor | float) -> Interval:
    """The sum of x and a constant."""
    offset = torch.as_tensor(offset, dtype=torch.float64, device=x.lower.device).detach()
    return Interval(down(x.lower + offset), up(x.upper + offset))


def scale(x: Interval, factor: Tensor | float, error: float = 0.0) -> Interval:
    """The product of x and a constant that broadcasts to it and has this relative error."""
    factor = torch.as_tensor(factor, dtype=torch.float64, device=x.lower.device).detach()
    ends = [_product(end, factor) for end in (x.lower, x.upper)]
    lower, upper = torch.minimum(*ends), torch.maximum(*ends)
    margin = (error + EPS) * torch.maximum(lower.abs(), upper.abs()) + TINY
    return Interval(_below(lower, margin), _above(upper, margin))


def add(a: Interval, b: Interval) -> Interval:
    """The sum."""
    norm = up(a.norm + b.norm) if a.shape == b.shape else None
    return Interval(down(a.lower + b.lower), up(a.upper + b.upper), norm)


def negative(x: Interval) -> Interval:
    """-x."""
    return Interval(-x.upper, -x.lower, x.norm)


def subtract(a: Interval, b: Interval) -> Interval:
    """The difference."""
    return add(a, negative(b))


def multiply(a: Interval, b: Interval) -> Interval:
    """The elementwise product."""
    ends = [_product(s, t) for s in (a.lower, a.upper) for t in (b.lower, b.upper)]
    lower = torch.stack(torch.broadcast_tensors(*ends)).amin(0)
    upper = torch.stack(torch.broadcast_tensors(*ends)).amax(0)
    norm = None
    if a.shape == b.shape:
        norm = torch.minimum(
            _product(as_rows(a.magnitude()).amax(1), b.norm), _product(a.norm, as_rows(b.magnitude()).amax(1))
        )
        norm = norm * (1.0 + 4.0 * EPS) + TINY
    return Interval(_below(lower, TINY), _above(upper, TINY), norm)


def divide(a: Interval, b: Interval) -> Interval:
    """The elementwise quotient; unbounded where b may be 0."""
    safe = (b.lower > 0.0) | (b.upper < 0.0)
    low, high = 1.0 / torch.where(safe, b.upper, 1.0), 1.0 / torch.where(safe, b.lower, 1.0)
    inverse = Interval(
        torch.where(safe, _below(low, TINY), -INF),
        torch.where(safe, _above(high, TINY), INF),
    )
    return multiply(a, inverse)


def matmul(a: Interval, b: Interval) -> Interval:
    """Matrix products of the last two axes, which each have at least; elsewhere the shapes broadcast."""
    (ca, ra), (cb, rb) = a.centre_and_radius(), b.centre_and_radius()
    relative = 1.01 * (a.lower.shape[-1] + 4) * EPS
    middle = ca @ cb
    spread = ca.abs() @ (rb + relative * cb.abs() + TINY) + (ra + TINY) @ (cb.abs() + rb + TINY)
    spread = spread * (1.0 + 4.0 * relative) + 4.0 * a.lower.shape[-1] * TINY
    lost = ~(middle.isfinite() & spread.isfinite())
    lower, upper = down(middle - spread), up(middle + spread)
    norm = None
    if a.shape[:-2] == b.shape[:-2]:
        norm = _product(a.norm, b.norm) * (1.0 + 4.0 * EPS) + TINY
    lower, upper = torch.where(lost, -INF, lower), torch.where(lost, INF, upper)
    for signed, positive, turn in ((a, b, False), (b, a, True)):
        if bool((positive.lower >= 0.0).all() & signed.norm.isfinite().all() & positive.norm.isfinite().all()):
            low, high = _times_positive(signed, positive, turn)
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
    return Interval(lower, upper, norm)


def _times_positive(x: Interval, positive: Interval, turned: bool) -> tuple[Tensor, Tensor]:
    """Bounds of x @ positive, or of positive @ x if ``turned``, with elements >= 0: each takes the end of its sign.

    Unlike those by centre and radius, a sum of products >= 0 is bounded by 0 from below.
    """

    def times(t: Tensor, end: Tensor) -> Tensor:
        return end @ t if turned else t @ end

    count = x.lower.shape[-2 if turned else -1]
    relative = 1.01 * (count + 4) * EPS
    ends = []
    for end, with_plus, with_minus, sign in (
        (x.lower, positive.lower, positive.upper, -1.0),
        (x.upper, positive.upper, positive.lower, 1.0),
    ):
        plus, minus = times(end.clamp_min(0.0), with_plus), times(end.clamp_max(0.0), with_minus)
        moved = plus + minus + sign * (relative * (plus - minus) + 4.0 * count * TINY)
        # Without products of the other sign the sum cannot cross 0.
        none = times((end < 0.0).double() if sign < 0.0 else (end > 0.0).double(), torch.ones_like(with_plus)) == 0.0
        crossed = moved.clamp_min(0.0) if sign < 0.0 else moved.clamp_max(0.0)
        ends.append(torch.where(none, crossed, moved))
    return ends[0], ends[1]


def concatenate(parts: Sequence[Interval], dim: int) -> Interval:
    """The parts side by side along an axis, counted with the batch axis."""
    domains = max(part.batch for part in parts)
    ends = [
        torch.cat([end.expand(domains, *end.shape[1:]) for end in some], dim)
        for some in ([p.lower for p in parts], [p.upper for p in parts])
    ]
    norm = upper_norm(torch.stack([part.norm.expand(domains) for part in parts], 1))
    return Interval(ends[0], ends[1], norm)


def softmax(x: Interval, dim: int) -> Interval:
    """Softmax along an axis, counted with the batch axis: each value is least where its own input is and others not."""
    top = x.upper.amax(dim, keepdim=True)
    known = top.isfinite()
    top = torch.where(known, top, 0.0)
    count = x.lower.shape[dim]
    ends = []
    for end, sign in ((x.lower, -1.0), (x.upper, 1.0)):
        power = end - top
        # An error of the exponent is a relative one of the exponential.
        slack = _FEW * (1.0 + power.abs().clamp_max(800.0))
        ends.append(power.exp() * (1.0 + sign * slack))
    low, high = ends[0], ends[1] + TINY
    sums = 1.01 * (count + 4) * EPS
    others_high = (high.sum(dim, keepdim=True) * (1.0 + sums) - high * (1.0 - sums)).clamp_min(0.0)
    others_low = (low.sum(dim, keepdim=True) * (1.0 - sums) - low * (1.0 + sums)).clamp_min(0.0)
    lower = torch.where(known, low / (low + others_high) * (1.0 - _FEW), 0.0)
    upper = torch.where(known, high / (high + others_low) * (1.0 + _FEW), 1.0).clamp_max(1.0)
    rows = math.prod(x.shape) // count
    norm = x.norm.new_full((x.batch,), math.sqrt(rows) * (1.0 + EPS))
    return Interval(lower, upper, norm)


def normalised(
    x: Interval,
    axes: Sequence[int],
    eps: float,
    *,
    centred: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Interval:
    """LayerNorm and kin: (x - mean) / sqrt(var + eps) over the axes, counted with the batch axis, and an affine map.

    Whatever x is, no element can exceed sqrt(d - 1), nor the d of them sqrt(d) in L2 norm (without ``centred``, as in
    RMSNorm, sqrt(d)). Where x is known within less, its mean and deviation say more.

    Args:
        x: bounds of the input.
        axes: over which mean and variance are taken.
        eps: what is added to the variance.
        centred: whether the mean is taken off.
        weight: factors that broadcast to the output; None for 1.
        bias: offsets that broadcast to the output; None for 0.
    """
    axes = [axis % x.lower.dim() for axis in axes]
    d = math.prod(x.lower.shape[axis] for axis in axes)
    most = torch.full_like(x.lower, math.sqrt(d - 1 if centred else d) * (1.0 + _FEW))
    reset = Interval(-most, most, x.norm.new_full((x.batch,), math.sqrt(math.prod(x.shape)) * (1.0 + _FEW)))
    n = reset
    if bool(x.norm.isfinite().any()):
        c, r = x.centre_and_radius()
        slack = 1.01 * (d + 8) * EPS
        if centred:
            mean = c.mean(axes, keepdim=True)
            middle = c - mean
            spread = r + r.mean(axes, keepdim=True) + slack * (c.abs() + c.abs().mean(axes, keepdim=True))
        else:
            middle, spread = c, r
        spread = spread * (1.0 + slack) + TINY
        # The deviation changes by at most the norm of what is added.
        centre_size = torch.linalg.vector_norm(middle, dim=axes, keepdim=True)
        distance = torch.linalg.vector_norm(spread, dim=axes, keepdim=True) * (1.0 + slack) + TINY
        least = (centre_size * (1.0 - slack) - distance).clamp_min(0.0).square() / d * (1.0 - slack)
        largest = (centre_size * (1.0 + slack) + distance).square() / d * (1.0 + slack)
        deviation = Interval((least + eps).sqrt() * (1.0 - _FEW), (largest + eps).sqrt() * (1.0 + _FEW) + TINY)
        n = divide(Interval(down(middle - spread), up(middle + spread)), deviation).intersection(reset)
    norm = n.norm
    if weight is not None:
        weight = weight.detach().double()
        norm = norm * weight.abs().amax() * (1.0 + 4.0 * EPS)
        n = scale(n, weight)
    if bias is not None:
        offset = bias.detach().double()
        n, norm = shift(n, offset), norm + upper_norm(offset.abs().expand(1, *x.shape))
    return Interval(n.lower, n.upper, up(norm))


def through_function(
    x: Interval,
    function: Callable[[Tensor], Tensor],
    *,
    error: float = _FEW,
    least_at: float | None = None,
    least: float = -INF,
    limits: tuple[float, float] = (-INF, INF),
    low_end: float | None = None,
) -> Interval:
    """An elementwise function that rises, or that falls up to one point and rises from there on.

    Args:
        x: bounds of its argument.
        function: in float64.
        error: bound on its error, relative to the sum of value's and argument's magnitudes; 0 if it is exact.
        least_at: about where it is least, if it falls before.
        least: its least value, rounded downwards.
        limits: between which all of its values lie.
        low_end: limit at -inf, where computing it gives NaN.
    """
    ends = []
    for end in (x.lower, x.upper):
        value = function(end)
        if low_end is not None:
            value = torch.where(end == -INF, low_end, value)
        ends.append(value)
    if error:
        margins = [
            error * (torch.where(v.isfinite(), v, 0.0).abs() + torch.where(e.isfinite(), e, 0.0).abs()) + TINY
            for v, e in zip(ends, (x.lower, x.upper), strict=True)
        ]
    else:
        margins = [torch.zeros_like(x.lower)] * 2
    if least_at is None:
        lower, upper = ends[0] - margins[0], ends[1] + margins[1]
    else:
        lower = torch.minimum(ends[0] - margins[0], ends[1] - margins[1])
        upper = torch.maximum(ends[0] + margins[0], ends[1] + margins[1])
        near = 1e-3 * (1.0 + abs(least_at))
        crosses = (x.lower <= least_at + near) & (x.upper >= least_at - near)
        lower = torch.where(crosses, least, lower)
    return Interval(lower.clamp(*limits), upper.clamp(*limits))


def has_interval(module: nn.Module) -> bool:
    """Whether :func:`module_interval` knows the module's class, and the module keeps its ``forward``."""
    kind = next((cls for cls in type(module).__mro__ if cls in _MODULES), None)
    return kind is not None and keeps_forward(module, kind)


def module_interval(module: nn.Module, x: Interval) -> Interval | None:
    """What a module without weights does to an interval, and PReLU; None if that is not known, as :func:`has_interval`.

    Layers with weights and BatchNorm are left to :func:`through_operator` and :func:`scale`.
    """
    if not has_interval(module):
        return None
    return next(_MODULES[cls] for cls in type(module).__mro__ if cls in _MODULES)(module, x)


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module without weights as a function that leaves its argument as it is, without hooks."""
    return lambda t: type(module).forward(module, t.clone())


def _rises(error: float = _FEW, **limits: Any) -> Callable[[nn.Module, Interval], Interval]:
    return lambda module, x: through_function(x, _forward(module), error=error, **limits)


def _dips(least_at: float, least: float) -> Callable[[nn.Module, Interval], Interval]:
    """An activation that falls from 0 at -inf to its least value, and rises from there on."""
    return lambda module, x: through_function(x, _forward(module), least_at=least_at, least=least, low_end=0.0)


def _softplus(module: nn.Module, x: Interval) -> Interval:
    assert isinstance(module, nn.Softplus)
    beta = float(module.beta)
    if not beta > 0.0:
        return Interval.unbounded(x.shape, x.batch, x.lower.device)
    y = through_function(x, _forward(module), limits=(0.0, INF))
    jump = softplus_jump(module)
    return Interval(y.lower - jump, y.upper + jump)


def softplus_jump(module: nn.Softplus) -> float:
    """By how much a Softplus falls at its threshold: above it torch leaves out log(1 + exp(-beta x)) / beta."""
    return math.log1p(math.exp(-float(module.threshold))) / abs(float(module.beta)) * (1.0 + _FEW)


def _elu(alpha: Callable[[Any], float]) -> Callable[[nn.Module, Interval], Interval]:
    def interval(module: nn.Module, x: Interval) -> Interval:
        if alpha(module) >= 0.0:
            return through_function(x, _forward(module))
        return through_function(x, _forward(module), least_at=0.0, least=-1e-300)

    return interval


def _leaky_relu(slope: Callable[[Any], Tensor]) -> Callable[[nn.Module, Interval], Interval]:
    def interval(module: nn.Module, x: Interval) -> Interval:
        a = slope(module).detach().double().to(x.lower.device)
        a = a.view(-1, *(1,) * (len(x.shape) - 1)) if a.numel() > 1 else a
        ends = [torch.where(end > 0.0, end, _product(end, a)) for end in (x.lower, x.upper)]
        lower, upper = torch.minimum(*ends), torch.maximum(*ends)
        crosses = (x.lower < 0.0) & (x.upper > 0.0)
        lower = torch.where(crosses, lower.clamp_max(0.0), lower)
        return Interval(_below(lower, TINY), _above(upper, TINY))

    return interval


def _pool(module: nn.Module, x: Interval) -> Interval:
    return Interval(_forward(module)(x.lower), _forward(module)(x.upper))


def _average(module: nn.Module, x: Interval) -> Interval:
    apply = _forward(module)
    if (getattr(module, "divisor_override", None) or 1) < 0:
        return negative(monotone_linear(lambda t: -apply(t), x, math.prod(x.shape)))
    return monotone_linear(apply, x, math.prod(x.shape))


def _upsample(module: nn.Module, x: Interval) -> Interval:
    assert isinstance(module, nn.Upsample)
    if module.mode == "bicubic":  # whose coefficients have both signs
        return Interval.unbounded(_forward(module)(x.lower[:1]).shape[1:], x.batch, x.lower.device)
    return monotone_linear(_forward(module), x, 16)


def _moves(module: nn.Module, x: Interval) -> Interval:
    return Interval(_forward(module)(x.lower), _forward(module)(x.upper), x.norm)


#: Where GELU by erf and by tanh, SiLU, Mish and Hardswish are least, and what they are there, rounded downwards; a test
#: derives them.
_MODULES: dict[type[nn.Module], Callable[[Any, Interval], Interval]] = {
    nn.ReLU: _rises(0.0),
    nn.ReLU6: _rises(0.0),
    nn.Hardtanh: _rises(0.0),
    nn.Sigmoid: _rises(limits=(0.0, 1.0)),
    nn.Hardsigmoid: _rises(limits=(0.0, 1.0)),
    nn.Tanh: _rises(limits=(-1.0, 1.0)),
    nn.Softsign: _rises(limits=(-1.0, 1.0)),
    nn.Tanhshrink: _rises(),
    nn.Softshrink: _rises(),
    nn.LogSigmoid: _rises(limits=(-INF, 0.0)),
    nn.SELU: _rises(),
    nn.GELU: _dips(-0.752, -0.17005),
    nn.SiLU: _dips(-1.2785, -0.27847),
    nn.Mish: _dips(-1.1925, -0.30885),
    nn.Hardswish: _dips(-1.5, -0.37501),
    nn.Softplus: _softplus,
    nn.ELU: _elu(lambda m: m.alpha),
    nn.CELU: _rises(),
    nn.RReLU: _leaky_relu(lambda m: torch.tensor(0.5 * (m.lower + m.upper), dtype=torch.float64)),
    nn.Threshold: _rises(),
    nn.LeakyReLU: _leaky_relu(lambda m: torch.tensor(m.negative_slope, dtype=torch.float64)),
    nn.PReLU: _leaky_relu(lambda m: m.weight),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _pool),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _average),
    nn.Upsample: _upsample,
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle), _moves),
    **dict.fromkeys((nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _moves),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _moves),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), _moves),
}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product, where 0 times an infinite end is 0: the values themselves are finite."""
    product = a * b
    return torch.where(product.isnan(), 0.0, product)


def _below(t: Tensor, margin: Tensor | float) -> Tensor:
    return down(t - margin)


def _above(t: Tensor, margin: Tensor | float) -> Tensor:
    return up(t + margin)
