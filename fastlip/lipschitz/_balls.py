"""Local Lipschitz constants on balls of inputs, bounded from both sides."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from fastlip.lipschitz._ball_graph import Balls, TooLargeError, jacobian_norms
from fastlip.lipschitz._bound import lipschitz_bound
from fastlip.lipschitz._domain import domain_of
from fastlip.lipschitz._graph import Traced, trace
from fastlip.lipschitz._local import local_lipschitz, unit
from fastlip.lipschitz._replay import in_float64, replay
from fastlip.norms import NormOptions
from fastlip.norms._models.eval_mode import eval_mode, require_eval
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._options import NormKeywords, chosen_options

#: Elements of the largest tensor of columns, and samples that are bounded together.
_MOST_ELEMENTS, _MOST_SAMPLES = 1 << 25, 32
_NORMS = ("l2", "linf")


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
    norm: str = "l2",
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
    are too large for it, or branch around steps other than affine ones and activations, get :func:`lipschitz_bound`.

    Lower sides: :func:`local_lipschitz` at the sample and at other points of the ball.

    For margins append the differences of outputs to the model, as a linear layer.

    Args:
        model: as for :func:`lipschitz_bound`; it is not changed.
        x: samples, [B, ...], in the model's dtype and on its device.
        radius: of the balls: one, or one for each sample, [B].
        norm: norm of the balls, "l2" or "linf". The constants are those of the L2 norm in either case.
        points: points of each ball, the sample included, at which the Jacobian's norm is computed.
        check: whether to compare the traced graph with the model.
        options: how to compute norms for :func:`lipschitz_bound`, where that is needed; its ``generator`` also draws
            the points.
        keywords: fields of :class:`fastlip.norms.NormOptions`, in place of ``options``.

    Raises:
        TypeError: the model is not a module.
        ValueError: an argument is wrong; or as for :func:`lipschitz_bound` and :func:`local_lipschitz`.
    """
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"x must be a floating-point batch [B, ...], got {x.dtype} of shape {list(x.shape)}")
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    bare = bare_model(model)
    radii = _radii(radius, x)
    chosen = chosen_options("local_lipschitz_bounds", options, keywords)
    lower, where = _attained(bare, x, radii, norm, points, chosen.resolved(bare.parameters()).generator)
    confidence = 1.0
    upper = _upper_sides(bare, Balls(x.detach().double(), radii, norm), check)
    missing = upper.isnan()
    if bool(missing.any()):
        bound = lipschitz_bound(bare, x.shape[1:], check=check, options=chosen)
        upper = torch.where(missing, bound.upper, upper)
        confidence = bound.confidence
    return BallBounds(lower, upper, where, radii, norm, confidence)


def _radii(radius: float | Tensor, x: Tensor) -> Tensor:
    given = torch.as_tensor(radius, dtype=torch.float64, device=x.device).detach()
    if given.dim() > 1 or given.numel() not in (1, len(x)):
        raise ValueError(f"radius must be one number or one for each of {len(x)} samples, got {list(given.shape)}")
    if not bool(((given >= 0.0) & given.isfinite()).all()):
        raise ValueError("radius must be finite and >= 0")
    return given.expand(len(x)) if given.dim() else given[None].expand(len(x))


def _upper_sides(model: nn.Module, balls: Balls, check: bool) -> Tensor:
    """Upper bounds from the graph of Jacobians, [B]; NaN where this way does not work."""
    shape, training = balls.x.shape[1:], model.training
    upper = torch.full_like(balls.radius, torch.nan)
    with eval_mode(model):
        traced = trace(model, shape)
        require_eval(model, training, traced.modules())
        if check:
            replay(model, shape, traced, domain_of(shape, None, None, None))
        with torch.no_grad(), in_float64(model, balls.x):
            at, size = 0, _MOST_SAMPLES
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


def _some(traced: Traced, balls: Balls) -> Tensor | None:
    try:
        return jacobian_norms(traced, balls, _MOST_ELEMENTS)
    except TooLargeError:
        return None


def _attained(
    model: nn.Module, x: Tensor, radii: Tensor, norm: str, points: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The largest Jacobian norm among points of each ball, [B], and where it is attained."""
    best, where = local_lipschitz(model, x, generator=generator), x.detach().clone()
    rows = radii.view(-1, *(1,) * (x.dim() - 1))
    for i in range(1, points):
        step = torch.randn(x.shape, dtype=torch.float64, generator=generator, device=generator.device).to(x.device)
        step = step.sign() if norm == "linf" else unit(step)
        # Half of the points are at the edge.
        share = 1.0 if i % 2 else (i / points)
        moved = (x.detach().double() + share * (1.0 - 1e-6) * rows * step).to(x)
        found = local_lipschitz(model, moved, generator=generator)
        better = found > best
        best = torch.where(better, found, best)
        where = torch.where(better.view(rows.shape), moved, where)
    return best, where
