"""Local Lipschitz constants on balls of inputs, bounded from both sides."""

import math
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor, nn

from fastlip.lipschitz._ball_graph import jacobian_norms
from fastlip.lipschitz._ball_pass import Balls, NotApplicable
from fastlip.lipschitz._bound import lipschitz_bound
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._domain import domain_of
from fastlip.lipschitz._graph import Traced, trace
from fastlip.lipschitz._local import local_lipschitz, unit
from fastlip.lipschitz._masked_products import masked_products
from fastlip.lipschitz._replay import in_float64, replay
from fastlip.norms import NormOptions
from fastlip.norms._models.eval_mode import eval_mode, require_eval
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._options import NormKeywords, ResolvedOptions, chosen_options
from fastlip.ops._checks import checked_norm

#: Elements of the largest tensor of columns.
_MOST_ELEMENTS = 1 << 25
#: Elements of the columns of the inputs up to which samples are bounded together, as larger tensors leave the cache and
#: cost page faults; and the most samples.
_CACHED, _MOST_SAMPLES = 1 << 20, 16
#: Elements of the points at which the Jacobians are looked at together, if one of each ball is not more already.
_MOST_POINTS = 1 << 20
_NORMS = ("l2", "linf")
#: Ratio of the two sides from which on it is worth asking for the bound that holds everywhere.
_FAR = 2.0
#: Balls in a row whose own bounds are not that much smaller, after which no more of them are computed.
_IN_VAIN = 4
#: Steps of the first look at a point's Jacobian, and the growth per step at which it ends.
_FIRST_STEPS, _FIRST_RTOL = 12, 1e-2


@dataclass(frozen=True, eq=False)
class BallBounds:
    """The L2 Lipschitz constants of a network on balls around B samples, bounded from both sides.

    Attributes:
        lower: norm of the Jacobian at a point of each ball, [B] float64: the largest that was found.
        upper: what no two points of the ball exceed, [B] float64; inf where nothing bounds it.
        points: where ``lower`` is attained, [B, ...] in the samples' dtype.
        radius: radii of the balls, [B] float64.
        norm: norm of the balls, "l2" or "linf".
        confidence: probability that the upper sides hold; 1.0 unless a norm was bounded by random start vectors.
    """

    lower: Tensor
    upper: Tensor
    points: Tensor
    radius: Tensor
    norm: str
    confidence: float


def local_lipschitz_bounds(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    radius: float | Tensor,
    *,
    norm: str | float = "l2",
    points: int = 8,
    check: bool = True,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> BallBounds:
    """Both sides of a network's L2 Lipschitz constant on a ball around each sample, for all samples at once.

    Upper sides: interval arithmetic and a zonotope tell how far the slope of each activation can range on the ball.
    Where a ReLU keeps to one side of its kink, it is linear; the layers around it merge, or lose rows and columns (Y.
    Huang, H. Zhang, Y. Shi, J. Z. Kolter and A. Anandkumar, "Training certifiably robust neural networks with
    efficient local Lipschitz bounds", NeurIPS 2021). The others are bounded together, by a scaled small-gain condition
    that is certified against rounding. As for Jacobians bounded elementwise (Z. Shi, Y. Wang, H. Zhang, J. Z. Kolter
    and C.-J. Hsieh, "Efficiently computing local Lipschitz constants of neural networks via bound propagation",
    NeurIPS 2022), this takes a matrix of as many columns as the input has elements, and those open units. Networks that
    are too large for it, or branch around steps other than affine ones and activations, get the least of
    :func:`lipschitz_bound`, everywhere and on the ball, and of the same composition with masked layers: in front of a
    layer, each unit counts with its largest slope on the ball, so that inactive ones drop out. Other steps multiply,
    each by its constant on the ball.

    Lower sides: :func:`local_lipschitz` at the sample and at other points of the ball, in the end in float64 where the
    model runs in it.

    For margins append the differences of outputs to the model, as a linear layer.

    Args:
        model: as for :func:`lipschitz_bound`; it is not changed.
        x: samples, [B, ...], in the model's dtype and on its device.
        radius: of the balls: one, or one for each sample, [B].
        norm: norm of the balls, "l2" or "linf", or as other libraries spell them. The constants are those of the L2
            norm in either case.
        points: points of each ball, the sample included, at which the Jacobian's norm is computed.
        check: whether to compare the traced graph with the model.
        options: how to compute norms, where that is needed; its ``generator`` also draws
            the points.
        keywords: fields of :class:`fastlip.norms.NormOptions`, in place of ``options``.

    Raises:
        TypeError: the model is not a module.
        ValueError: an argument is wrong; or as for :func:`lipschitz_bound` and :func:`local_lipschitz`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> local = fastlip.lipschitz.local_lipschitz_bounds(model, torch.rand(4, 6), radius=0.05)
        >>> print(local.lower, local.upper)
    """
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"x must be a floating-point batch [B, ...], got {x.dtype} of shape {list(x.shape)}")
    if (norm := checked_norm(norm)) not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    bare = bare_model(model)
    radii = _radii(radius, x)
    chosen = chosen_options("local_lipschitz_bounds", options, keywords)
    if not len(x):
        return BallBounds(radii, radii, x.detach().clone(), radii, norm, 1.0)
    lower, where = _attained(bare, x, radii, norm, points, chosen.resolved(bare.parameters()).generator)
    balls = Balls(x.detach().double(), radii, norm)
    upper, confidence = _upper_sides(bare, balls, check, chosen, lower)
    return BallBounds(lower, upper, where, radii, norm, confidence)


def _radii(radius: float | Tensor, x: Tensor) -> Tensor:
    given = torch.as_tensor(radius, dtype=torch.float64, device=x.device).detach()
    if given.dim() > 1 or given.numel() not in (1, len(x)):
        raise ValueError(f"radius must be one number or one for each of {len(x)} samples, got {list(given.shape)}")
    if not bool(((given >= 0.0) & given.isfinite()).all()):
        raise ValueError("radius must be finite and >= 0")
    return given.expand(len(x)) if given.dim() else given[None].expand(len(x))


def _upper_sides(
    model: nn.Module, balls: Balls, check: bool, options: NormOptions, lower: Tensor
) -> tuple[Tensor, float]:
    """Upper bounds, [B], and the confidence that all of them hold."""
    shape, training = balls.x.shape[1:], model.training
    with eval_mode(model):
        traced = trace(model, shape)
        require_eval(model, training, traced.modules())
        if check:
            replay(model, shape, traced, domain_of(shape, None, None, None))
        with torch.no_grad(), in_float64(model, balls.x):
            upper = _by_jacobians(traced, balls)
            missing = ~upper.isfinite()
            if _varies(traced):
                # Each starts anew, behind which a composition may know more.
                missing |= upper > _FAR * lower
            if not bool(missing.any()):
                # With most units open nothing is local any more, and the whole network has more time. What holds
                # everywhere is at least the largest lower side.
                far = upper > _FAR * lower.max()
                return _capped(model, shape, upper, options) if bool(far.any()) else (upper, 1.0)
            # The least of two bounds holds if both do.
            halved = replace(options, confidence=1.0 - (1.0 - options.confidence) / 2.0)
            rest = Balls(balls.x[missing], balls.radius[missing], balls.norm)
            masked, chance = _by_masks(traced, rest, halved.resolved(model.parameters()))
            upper[missing] = torch.fmin(upper[missing], masked)
    try:
        composed, other = _by_composition(model, rest, check, halved, traced)
    except ValueError:
        if not bool(upper.isfinite().all()):
            raise
        return upper, chance
    upper[missing] = torch.minimum(upper[missing], composed)
    return upper, max(0.0, 1.0 - (1.0 - chance) - (1.0 - other))


def _capped(model: nn.Module, shape: torch.Size, upper: Tensor, options: NormOptions) -> tuple[Tensor, float]:
    """The least of upper bounds and of the one that holds everywhere, if there is one."""
    try:
        everywhere = lipschitz_bound(model, shape, check=False, options=options)
    except ValueError:
        return upper, 1.0
    return upper.clamp_max(everywhere.upper), everywhere.confidence


def _varies(traced: Traced) -> bool:
    """Whether factors depend on how large values are."""
    return any(isinstance(step.factor, Weighted) for step in traced.steps.values())


def _by_jacobians(traced: Traced, balls: Balls) -> Tensor:
    """Upper bounds from columns of Jacobians, [B]; NaN where they do not fit."""
    upper = torch.full_like(balls.radius, torch.nan)
    widest = max(math.prod(step.shape) for step in traced.steps.values())
    columns = max(1, balls.x[0].numel() * widest)
    at, size = 0, min(_MOST_SAMPLES, max(1, _CACHED // columns))
    while at < len(upper):
        some = slice(at, at + size)
        found = _some(traced, Balls(balls.x[some], balls.radius[some], balls.norm))
        if found is not None:
            upper[some] = found
            at += size
        elif size > 1:
            size //= 2
        else:
            break
    return upper


def _by_masks(traced: Traced, balls: Balls, options: ResolvedOptions) -> tuple[Tensor, float]:
    """Upper bounds from masked layers, [B], and their confidence; inf where masks are not enough."""
    try:
        return masked_products(traced, balls, options)
    except NotApplicable:
        return torch.full_like(balls.radius, torch.inf), 1.0


def _by_composition(
    model: nn.Module, balls: Balls, check: bool, options: NormOptions, traced: Traced
) -> tuple[Tensor, float]:
    """The least of :func:`lipschitz_bound` everywhere and on each ball by itself; and the confidence of all.

    A ball has a smaller one where factors depend on how large values are, as those of attention and LayerNorm do. Where
    that hardly helps for some balls in a row, larger ones keep what holds everywhere.
    """
    shape, upper = balls.x.shape[1:], torch.full_like(balls.radius, torch.inf)
    varies = _varies(traced)
    each = replace(options, confidence=1.0 - (1.0 - options.confidence) / (len(balls.x) + 1))
    everywhere, doubts = math.inf, 0.0
    try:
        bound = lipschitz_bound(model, shape, check=check, options=each if varies else options)
    except ValueError:
        refused = True
    else:
        refused, everywhere, doubts = False, bound.upper, 1.0 - bound.confidence
        upper.fill_(everywhere)
    if not (varies or refused):
        return upper, 1.0 - doubts
    reach, in_vain = balls.l2_radius(), 0
    for place in reach.argsort().tolist():
        try:
            bound = lipschitz_bound(
                model, shape, around=balls.x[place], radius=reach[place].item(), check=check, options=each
            )
        except ValueError:
            if refused:
                raise
            break
        upper[place] = min(everywhere, bound.upper)
        doubts += 1.0 - bound.confidence
        in_vain = in_vain + 1 if bound.upper > everywhere / _FAR else 0
        if in_vain == _IN_VAIN:
            break
    return upper, 1.0 - doubts


def _some(traced: Traced, balls: Balls) -> Tensor | None:
    try:
        return jacobian_norms(traced, balls, _MOST_ELEMENTS)
    except NotApplicable:
        return None


def _attained(
    model: nn.Module, x: Tensor, radii: Tensor, norm: str, points: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The largest Jacobian norm among points of each ball, [B], and where it is attained."""

    def norms(at: Tensor) -> Tensor:
        return local_lipschitz(model, at, rtol=_FIRST_RTOL, max_steps=_FIRST_STEPS, generator=generator)

    if points == 1:
        return _at(model, x, generator), x.detach().clone()
    best, where = norms(x), x.detach().clone()
    rows = radii.view(-1, *(1,) * (x.dim() - 1))
    at_once = max(1, _MOST_POINTS // max(x.numel(), 1))
    for first in range(1, points, at_once):
        some = torch.arange(first, min(first + at_once, points))
        draws = torch.randn(len(some), *x.shape, dtype=torch.float64, generator=generator, device=generator.device).to(
            x.device
        )
        step = draws.sign() if norm == "linf" else unit(draws.flatten(0, 1)).view_as(draws)
        # Half of the points are at the edge.
        share = torch.where(some % 2 == 1, 1.0, some / points).to(step).view(-1, *(1,) * x.dim())
        moved = (x.detach().double() + share * (1.0 - 1e-6) * rows * step).to(x)
        found = norms(moved.flatten(0, 1)).view(len(some), -1)
        largest, which = found.max(0)
        better = largest > best
        best = torch.where(better, largest, best)
        where = torch.where(better.view(rows.shape), moved[which, torch.arange(len(x))], where)
    return _at(model, where, generator), where


def _at(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """The Jacobian's norm at samples, [B], in float64: rounding of a narrower dtype could lift it above upper sides."""
    try:
        with in_float64(model, x.detach()) as wide:
            return local_lipschitz(model, wide, generator=generator)
    except Exception:  # the model may support one dtype only
        return local_lipschitz(model, x, generator=generator)
