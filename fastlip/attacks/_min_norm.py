"""The smallest perturbation that changes a decision: FMN, and a search over eps around PGD."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastlip._precision import Precision
from fastlip.attacks._arguments import check_call, check_choice, clipped_to, count, number, radius, share
from fastlip.attacks._batch import Batch, new_batch, per_sample, rows_where, take
from fastlip.attacks._criterion import Criterion, check_criterion
from fastlip.attacks._distance import distance, largest_radius, slope
from fastlip.attacks._fmn import fmn
from fastlip.attacks._loop import AttackLoop, start_points
from fastlip.attacks._model import Model, eval_mode
from fastlip.attacks._own_loss import AnyLoss
from fastlip.attacks._pgd import PgdStep, default_step
from fastlip.attacks._prepare import network_of
from fastlip.attacks._quantize import grid_of
from fastlip.ops import Bounds, Norm, PerSample

Method = Literal["fmn", "search", "both"]
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

#: The smallest radius to begin with, for images whose margin is next to nothing.
_LEAST_RADIUS = 1e-6
#: The largest radius of any search: steps in proportion to it stay finite in float32.
_LARGEST_RADIUS = 1e30

#: Shares by which a perturbation is lengthened for its decision to hold in any batch, least and most.
_LEAST_STRETCH, _MOST_STRETCH = 2.0**-16, 2.0**-6
#: Rounding error of a length, relative to it.
_SLACK = 1e-6

#: Forward passes spent on pulling a success back to the decision boundary.
_HALVINGS = 6


@dataclass(frozen=True)
class MinNormResult:
    """The smallest perturbation found for each image; its length is an upper bound on that of the truly smallest one.

    Where no perturbation was found the distance is right-censored: it is inf, ``found`` is False and the image is
    unchanged. An image that was misclassified to begin with has distance 0.

    Attributes:
        adversarial: misclassified images, [B, ...] like the inputs.
        distance: length of the perturbation in the norm of the search, [B] float64; for noise it is sigma.
        found: whether a perturbation was found, [B] bool.
        searched: largest radius (for noise, sigma) at which the search found nothing, [B] float64, 0 where it never
            failed and for "fmn", which searches no radii. Where nothing was found this is how far the search got; a
            smaller perturbation may have escaped it. All attacks here give it; None in results of others that do not.
    """

    adversarial: Tensor
    distance: Tensor
    found: Tensor
    searched: Tensor | None = None


def _searching_where_it_was(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Accept options of the search without a method, with a DeprecationWarning that is attributed to the caller."""

    @wraps(function)
    def accepting(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        given = [name for name in ("steps", "search_steps", "tolerance") if name in kwargs]
        if given and "method" not in kwargs:
            options = ", ".join(given)
            warnings.warn(
                f'min_norm\'s method is now "fmn" by default; give method="search" with {options}', DeprecationWarning,
                stacklevel=2,
            )  # fmt: skip
            kwargs["method"] = "search"
        return function(*args, **kwargs)

    return accepting


@_searching_where_it_was
def min_norm(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "l2",
    method: Method = "fmn",
    steps: int = 20,
    search_steps: int = 10,
    fmn_steps: int = 100,
    eps_max: PerSample | None = None,
    tolerance: float = 0.02,
    loss: AnyLoss = "dlr",
    criterion: Criterion | None = None,
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
    fast: bool = False,
    precision: Precision = None,
    quantize: int | None = None,
) -> MinNormResult:
    """Smallest perturbation in ``norm`` that changes the decision.

    "fmn" is the Fast Minimum-Norm attack (Pintor et al. 2021) with exact projections: runs in a ball that shrinks by a
    few per cent where the iterate is misclassified and grows where it is not, whose result is pulled back to the
    decision boundary along the segment to the input. "search" brackets eps for each image. The first radius is twice
    the one at which the margin's linearisation crosses zero. The radius is quadrupled while :func:`pgd` fails and
    bisected (geometrically) once it has succeeded. An adversarial image is pulled back, too, and the search of the
    next, smaller ball starts from there. Images whose bracket has closed take no further part. "search" finds longer
    perturbations than "fmn" does in as many passes, and says at which radii it found none (``searched``). "both"
    searches below what FMN found. All methods are deterministic.

    What is found is misclassified by more than the rounding by which logits differ between batches, so that it stays
    misclassified alone and in any batch; unless the model's logits of an image depend on the other images, or on
    chance, which :func:`diagnose` tells.

    Args:
        model: maps inputs to logits [B, C], or what :func:`prepare` made of one.
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        method: "fmn", "search" or "both". "search" was the default before, and it still is, with a DeprecationWarning,
            where an option of the search (``steps``, ``search_steps``, ``tolerance``) is given without a method.
        steps: gradient steps of the search at each radius.
        search_steps: number of radii that the search tries for each image.
        fmn_steps: gradient steps of FMN.
        eps_max: largest radius of interest, float or [B]; the box's diameter if None.
        tolerance: relative width at which the search closes a bracket.
        loss: as in :func:`pgd`; FMN follows "dlr" and "margin" alike, in a smooth form.
        criterion: as in :func:`pgd`.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        sparsity: as in :func:`pgd`.
        targets: classes to reach, [B] int64.
        active: [B] bool; False leaves an image out, which then comes back unchanged and not found, at distance inf.
        fast: as in :func:`pgd`.
        precision: as in :func:`pgd`.
        quantize: as in :func:`pgd`; lengths are those of the rounded perturbations.

    Returns:
        The smallest perturbations found.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> smallest = attacks.min_norm(model, images, labels, norm="l2")
        >>> print(smallest.distance, smallest.found)
    """
    inputs, labels, targets, _, bounds, norm = check_call(
        model, inputs, labels, targets, norm=norm, loss=loss, bounds=bounds, active=active, fast=fast,
        precision=precision,
    )  # fmt: skip
    check_choice(method, "method", ("fmn", "search", "both"))
    steps, sparsity = count(steps, "steps"), share(sparsity, "sparsity")
    search_steps, fmn_steps = count(search_steps, "search_steps", 1), count(fmn_steps, "fmn_steps", 1)
    tolerance = number(tolerance, "tolerance")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    check_criterion(criterion)
    grid = grid_of(quantize, inputs, bounds)
    if eps_max is None:
        limit = largest_radius(inputs, norm, bounds)
    else:
        eps_max = radius(eps_max, "eps_max", inputs)
        limit = torch.as_tensor(eps_max, dtype=torch.float64, device=inputs.device).expand(len(inputs))
    limit = limit.clamp_max(_LARGEST_RADIUS)
    with eval_mode(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=0.0, step_size=0.0, bounds=bounds, ids=None)
        loop = AttackLoop(network, inputs, norm=norm, loss="margin", grid=grid, criterion=criterion)
        search = _Search(inputs, limit, active)
        estimate, wrong = _first_radius(loop, batch)
        search.begin(estimate, wrong)
        loop.misclassified = int(wrong.sum())
        loop.loss = loss
        if method != "search" and len(rows := search.rows()) > 0:
            part, originals = batch.take(rows), take(search.inputs, rows)
            found, nearest = fmn(loop, part, estimate[rows], limit[rows], fmn_steps, sparsity)
            adversarial, found = _pull_back(loop, found, originals, part)
            success = adversarial & nearest.isfinite()
            search.update(rows, success, found, distance(found, originals, norm), tolerance)
            search.go_on_below(rows)
        for _ in range(search_steps if method != "fmn" else 0):
            rows = search.rows()
            if len(rows) == 0:
                break
            part, originals = batch.take(rows), take(search.inputs, rows)
            found = _found_within(loop, part, originals, search.radius[rows], take(search.best, rows), steps, sparsity)
            success, found = _pull_back(loop, found, originals, part)
            search.update(rows, success, found, distance(found, originals, norm), tolerance)
        _make_firm(loop, search, batch)
    loop.warn("min_norm", aimed=targets is not None or criterion is not None, stacklevel=4)
    return MinNormResult(
        adversarial=search.best, distance=search.high, found=search.high.isfinite(), searched=search.low
    )


class _Search:
    """Brackets [low, high] on the smallest radius: PGD failed at ``low``, and ``best`` lies at ``high``."""

    def __init__(
        self,
        inputs: Tensor,  # [B, ...]
        limit: Tensor,  # [B] float64
        active: Tensor | None,  # [B] bool
    ) -> None:
        self.inputs = inputs.detach().clone()
        self.best = self.inputs.clone()
        self.limit = limit
        self.low = torch.zeros_like(limit)
        self.high = torch.full_like(limit, torch.inf)
        self.radius = torch.zeros_like(limit)
        self.open = torch.ones_like(limit, dtype=torch.bool) if active is None else active.clone()

    def rows(self) -> Tensor:
        """Positions of the images whose bracket is still open, [K] int64."""
        return rows_where(self.open)

    def go_on_below(
        self,
        rows: Tensor,  # [K] int64
    ) -> None:
        """Search below what another method found for ``rows``, whose failures say nothing about PGD."""
        self.open[rows] = self.high[rows] > 0
        self.low.zero_()

    def begin(
        self,
        estimate: Tensor,  # [B] float64
        wrong: Tensor,  # [B] bool
    ) -> None:
        """Close the brackets of images that are misclassified to begin with; choose the first radius of the others."""
        self.high[self.open & wrong] = 0.0
        self.open &= ~wrong
        self.radius = torch.minimum(2.0 * estimate, self.limit)

    def update(
        self,
        rows: Tensor,  # [K] int64
        success: Tensor,  # [K] bool
        found: Tensor,  # [K, ...]
        length: Tensor,  # [K] float64
        tolerance: float,
    ) -> None:
        """Take over what was found for ``rows`` and choose the next radii."""
        better = success & (length < self.high[rows])
        self.best[rows[better]] = found[better]
        self.high[rows[better]] = length[better]
        self.low[rows[~success]] = self.radius[rows[~success]]
        self.open &= (self.high > (1 + tolerance) * self.low) & (self.low < self.limit)
        # Halfway in the bracket, but at least half of the radius known to suffice, because small balls mostly fail.
        inside = (torch.maximum(self.low, self.high / 4) * self.high).sqrt()
        self.radius = torch.where(self.high.isfinite(), inside, torch.minimum(4.0 * self.radius, self.limit))


def _first_radius(loop: AttackLoop, batch: Batch) -> tuple[Tensor, Tensor]:
    """Radius at which the linearised margin is zero, [B] float64, and which images are misclassified, [B] bool."""
    if len(batch) == 0:  # not every model takes an empty batch
        nothing = torch.zeros(0, dtype=torch.float64, device=batch.x0.device)
        return nothing, nothing.bool()
    image, logits, judgement = loop.forward(batch, batch.x0)
    grad = loop.backward(image, logits, judgement)
    loop.not_finite[batch.rows] |= ~grad.flatten(1).isfinite().all(1)
    estimate = judgement.loss.double().abs() / slope(grad, loop.norm)
    wrong = judgement.adversarial
    if not loop.network.exact:
        wrong = loop.asked(batch, batch.x0, wrong, wrong | judgement.doubtful)
    return estimate.nan_to_num(nan=torch.inf).clamp_min(_LEAST_RADIUS), wrong


def _found_within(
    loop: AttackLoop,
    batch: Batch,
    originals: Tensor,  # [K, ...]
    eps: Tensor,  # [K] float64
    start: Tensor,  # [K, ...]
    steps: int,
    sparsity: float,
) -> Tensor:
    """What :func:`pgd` finds from ``start`` within ``eps`` of images that are classified correctly; [K, ...]."""
    inner = AttackLoop(
        loop.network, originals, norm=loop.norm, loss=loop.loss, grid=loop.grid, criterion=loop.criterion
    )
    rows = torch.arange(len(batch), device=batch.x0.device)
    ball = replace(batch, eps=eps, step_size=default_step(eps, steps), rows=rows)
    x = start_points(ball, loop.norm, random_start=False, start=start, generator=None)
    inner.run(ball, x, steps, PgdStep(loop.norm, sparsity))
    loop.not_finite[batch.rows] |= inner.not_finite
    return inner.result


@torch.no_grad()
def _pull_back(
    loop: AttackLoop,
    x: Tensor,  # [K, ...]
    x0: Tensor,  # [K, ...]
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """Whether ``x`` is misclassified, [K] bool, and the point nearest to ``x0`` on their segment that is so firmly."""
    adversarial = loop.own_decision(batch, x)
    best = x.clone()
    near, far = torch.zeros_like(adversarial, dtype=torch.float64), torch.ones_like(adversarial, dtype=torch.float64)
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        point = _as_kept(loop, batch, _on_line(x, x0, middle), x0)
        success = adversarial & loop.own_decision(batch, point, firm=True)
        best = torch.where(per_sample(success, x), point, best)
        near, far = torch.where(success, near, middle), torch.where(success, middle, far)
    return adversarial, best


@torch.no_grad()
def _make_firm(loop: AttackLoop, search: _Search, batch: Batch) -> None:
    """Move what was found away from the input until its decision holds in any batch; else it was not found."""
    rows = rows_where(search.high.isfinite() & (search.high > 0))
    stretch = _LEAST_STRETCH
    while len(rows) > 0:
        part, found, originals = batch.take(rows), take(search.best, rows), take(search.inputs, rows)
        if stretch > _LEAST_STRETCH:
            beyond = torch.full_like(search.high[rows], 1 + stretch)
            found = _as_kept(loop, part, clipped_to(_on_line(found, originals, beyond), part.bounds), originals)
        length = distance(found, originals, loop.norm)
        firm = loop.own_decision(part, found, firm=True) & (length <= (1 + _SLACK) * search.limit[rows])
        search.best[rows[firm]], search.high[rows[firm]] = found[firm], length[firm]
        rows = rows[~firm]
        if stretch > _MOST_STRETCH:
            break
        stretch *= 2
    search.low[rows] = search.high[rows]
    search.best[rows], search.high[rows] = search.inputs[rows], torch.inf


def _as_kept(
    loop: AttackLoop,
    batch: Batch,
    x: Tensor,  # [K, ...]
    x0: Tensor,  # [K, ...]
) -> Tensor:
    """``x``, or where values are quantized its rounding within its own distance, [K, ...]."""
    if loop.grid is None:
        return x
    return loop.image(replace(batch, eps=distance(x, x0, loop.norm)), x)


def _on_line(
    x: Tensor,  # [K, ...]
    x0: Tensor,  # [K, ...]
    share: Tensor,  # [K] float64
) -> Tensor:
    """x0 + share (x - x0), in float64 and rounded once, so that a point between two of the box stays inside it."""
    return (x0.double() + per_sample(share, x) * (x.double() - x0.double())).to(x.dtype)
