"""The smallest perturbation that changes a decision: FMN, and a search over eps around PGD."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastlip.attacks._arguments import check_choice, count, number, radius, share
from fastlip.attacks._batch import Batch, new_batch, rows_of, take, within
from fastlip.attacks._climb import Climb, rows_where
from fastlip.attacks._distance import check_norm, distance, largest_radius, slope
from fastlip.attacks._fmn import fmn
from fastlip.attacks._losses import Loss, check_loss, succeeded
from fastlip.attacks._model import Model, attacked
from fastlip.attacks._pgd import default_step, first_iterate, pgd_run, warn_of_lost_gradients
from fastlip.attacks._prepare import network_of
from fastlip.ops import Bounds, Norm, PerSample

Method = Literal["search", "fmn", "both"]

#: A radius to begin with where the margin is next to nothing.
_LEAST_RADIUS = 1e-6
#: A radius that no search goes beyond: steps in proportion to it stay finite in float32.
_LARGEST_RADIUS = 1e30

#: Forward passes spent on pulling a success back to the decision boundary.
_HALVINGS = 6


@dataclass(frozen=True)
class MinNormResult:
    """Smallest perturbations found, one for each image; a distance is an upper bound on the true smallest one.

    Where nothing was found the distance is right-censored: it is inf, ``found`` is False and the image is unchanged.
    An image that was misclassified to begin with has distance 0.

    Attributes:
        adversarial: misclassified images, [B, ...] like the inputs.
        distance: length of the perturbation, [B] float64, in the norm searched (for noise: sigma).
        found: whether a perturbation was found, [B] bool.
    """

    adversarial: Tensor
    distance: Tensor
    found: Tensor


def min_norm(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "l2",
    method: Method = "search",
    steps: int = 20,
    search_steps: int = 10,
    fmn_steps: int = 100,
    eps_max: PerSample | None = None,
    tolerance: float = 0.02,
    loss: Loss = "dlr",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
    fast: bool = False,
    precision: torch.dtype | None = None,
) -> MinNormResult:
    """Smallest perturbation in ``norm`` that changes the decision.

    "search" brackets eps for each image. The first radius is twice the one at which the margin's linearisation crosses
    zero. It is quadrupled while :func:`pgd` fails and bisected (geometrically) once it has succeeded; what succeeded is
    pulled back to the decision boundary along the segment to its input, and the next, smaller ball is searched from
    there. Images whose bracket has closed drop out. "fmn" is the Fast Minimum-Norm attack (Pintor et al. 2021) with
    exact projections: one run in a ball that shrinks by a few per cent where the iterate is misclassified and grows
    where it is not, then pulled back. "both" searches below what FMN found. All are deterministic.

    Args:
        model: maps inputs to logits [B, C], or what :func:`prepare` made of one.
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        method: "search", "fmn" or "both".
        steps: gradient steps of the search at each radius.
        search_steps: radii that the search tries for each image.
        fmn_steps: gradient steps of FMN.
        eps_max: largest radius of interest, float or [B]; the box's diameter if None.
        tolerance: relative width at which a bracket is closed.
        loss: as in :func:`pgd`.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        sparsity: as in :func:`pgd`.
        targets: classes to reach, [B] int64.
        active: [B] bool; False leaves an image out (unchanged, distance inf, not found).
        fast: as in :func:`pgd`.
        precision: as in :func:`pgd`.

    Returns:
        The smallest perturbations found.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.
    """
    bounds = within(inputs, bounds)
    check_loss(loss)
    check_norm(norm)
    check_choice(method, "method", ("search", "fmn", "both"))
    steps, sparsity = count(steps, "steps"), share(sparsity, "sparsity")
    search_steps, fmn_steps = count(search_steps, "search_steps", 1), count(fmn_steps, "fmn_steps", 1)
    tolerance = number(tolerance, "tolerance")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if eps_max is None:
        limit = largest_radius(inputs, norm, bounds)
    else:
        eps_max = radius(eps_max, "eps_max", inputs)
        limit = torch.as_tensor(eps_max, dtype=torch.float64, device=inputs.device).expand(len(inputs))
    limit = limit.clamp_max(_LARGEST_RADIUS)
    with attacked(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=0.0, step_size=0.0, bounds=bounds, ids=None)
        climb = Climb(network, inputs, norm=norm, loss="margin")
        search = _Search(inputs, limit)
        search.open[rows_of(active, inputs)] = True
        estimate, wrong = _first_radius(climb, batch)
        search.begin(estimate, wrong)
        climb.loss = loss
        if method != "search" and len(rows := search.rows()) > 0:
            part, originals = batch.take(rows), take(search.inputs, rows)
            found, nearest = fmn(climb, part, estimate[rows], limit[rows], fmn_steps, sparsity)
            hit, found = _pull_back(climb, found, originals, part)
            search.update(rows, hit & nearest.isfinite(), found, distance(found, originals, norm), tolerance)
            search.go_on_below()
        for _ in range(search_steps if method != "fmn" else 0):
            rows = search.rows()
            if len(rows) == 0:
                break
            part, originals = batch.take(rows), take(search.inputs, rows)
            found = _found_within(climb, part, originals, search.radius[rows], take(search.best, rows), steps, sparsity)
            hit, found = _pull_back(climb, found, originals, part)
            search.update(rows, hit, found, distance(found, originals, norm), tolerance)
    warn_of_lost_gradients("min_norm", climb)
    return MinNormResult(adversarial=search.best, distance=search.high, found=search.high.isfinite())


class _Search:
    """Brackets [low, high] on the smallest radius: PGD failed at ``low``, and ``best`` lies at ``high``."""

    def __init__(
        self,
        inputs: Tensor,  # [B, ...]
        limit: Tensor,  # [B] float64
    ) -> None:
        self.inputs = inputs.detach().clone()
        self.best = self.inputs.clone()
        self.limit = limit
        self.low = torch.zeros_like(limit)
        self.high = torch.full_like(limit, torch.inf)
        self.radius = torch.zeros_like(limit)
        self.open = torch.zeros_like(limit, dtype=torch.bool)

    def rows(self) -> Tensor:
        """Images that are still searched for, [K] int64."""
        return rows_where(self.open)

    def go_on_below(self) -> None:
        """Begin anew below what another method found: that it failed at some radius says nothing of PGD."""
        self.open |= self.high.isfinite() & (self.high > 0)
        self.low.zero_()

    def begin(
        self,
        estimate: Tensor,  # [B] float64
        wrong: Tensor,  # [B] bool
    ) -> None:
        """Settle the images that are misclassified as they are, and choose the others' first radius."""
        self.high[self.open & wrong] = 0.0
        self.open &= ~wrong
        self.radius = torch.minimum(2.0 * estimate, self.limit)

    def update(
        self,
        rows: Tensor,  # [K] int64
        hit: Tensor,  # [K] bool
        found: Tensor,  # [K, ...]
        length: Tensor,  # [K] float64
        tolerance: float,
    ) -> None:
        """Take in what was found for ``rows`` and choose the next radii."""
        better = hit & (length < self.high[rows])
        self.best[rows[better]] = found[better]
        self.high[rows[better]] = length[better]
        self.low[rows[~hit]] = self.radius[rows[~hit]]
        self.open &= (self.high > (1 + tolerance) * self.low) & (self.low < self.limit)
        # Halfway in the bracket, but never less than half of what is known to do: small balls mostly fail.
        inside = (torch.maximum(self.low, self.high / 4) * self.high).sqrt()
        self.radius = torch.where(self.high.isfinite(), inside, torch.minimum(4.0 * self.radius, self.limit))


def _first_radius(climb: Climb, batch: Batch) -> tuple[Tensor, Tensor]:
    """Radius at which the linearised margin is zero, [B] float64, and which images are misclassified, [B] bool."""
    if len(batch) == 0:  # not every model takes an empty batch
        nothing = torch.zeros(0, dtype=torch.float64, device=batch.x0.device)
        return nothing, nothing.bool()
    x = climb.seen(batch, batch.x0)
    margin, hit, doubtful = climb.losses(batch, x, gradient=True)
    estimate = -margin.detach().double() / slope(climb.gradient(margin, x, x), climb.norm)
    wrong = climb.settled(batch, x.detach(), hit, doubtful)
    return estimate.nan_to_num(nan=torch.inf).clamp_min(_LEAST_RADIUS), wrong


def _found_within(
    climb: Climb,
    batch: Batch,
    originals: Tensor,  # [K, ...]
    eps: Tensor,  # [K] float64
    start: Tensor,  # [K, ...]
    steps: int,
    sparsity: float,
) -> Tensor:
    """What :func:`pgd` finds within ``eps`` of images that are classified correctly, from ``start``; [K, ...]."""
    inner = Climb(climb.network, originals, norm=climb.norm, loss=climb.loss)
    rows = torch.arange(len(batch), device=batch.x0.device)
    ball = replace(batch, eps=eps, step_size=default_step(eps, steps), rows=rows)
    pgd_run(inner, ball, first_iterate(ball, climb.norm, False, start, None), steps, sparsity, from_inputs=False)
    climb.lost_gradients |= inner.lost_gradients
    return inner.result


@torch.no_grad()
def _pull_back(
    climb: Climb,
    x: Tensor,  # [K, ...]
    x0: Tensor,  # [K, ...]
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """Whether ``x`` is misclassified, [K] bool, and the point nearest to ``x0`` on their segment that still is."""
    hit = succeeded(climb.judge(batch, x), batch.labels, batch.targets)
    best = x.clone()
    near, far = torch.zeros_like(hit, dtype=torch.float64), torch.ones_like(hit, dtype=torch.float64)
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        share = middle.reshape(-1, *([1] * (x.dim() - 1)))
        # In float64 and rounded once, so that a point between two points of the box stays inside it.
        point = (x0.double() + share * (x.double() - x0.double())).to(x.dtype)
        fell = hit & succeeded(climb.judge(batch, point), batch.labels, batch.targets)
        best = torch.where(fell.reshape(share.shape), point, best)
        near, far = torch.where(fell, near, middle), torch.where(fell, middle, far)
    return hit, best
