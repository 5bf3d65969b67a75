"""The smallest perturbation that changes a decision, by a search over eps around PGD."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip.attacks._batch import Batch, check_classes, check_vector, new_batch, rows_of, take
from fastlip.attacks._losses import Loss, attack_loss, check_loss, succeeded
from fastlip.attacks._model import Model, attacked, logits_of
from fastlip.attacks._pgd import pgd
from fastlip.ops import Bounds, Norm, PerSample

_ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
_DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}

#: A radius to begin with where the margin is next to nothing.
_LEAST_RADIUS = 1e-6

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


def distance(
    x: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    norm: Norm,
) -> Tensor:
    """Length of x - x0 in ``norm``, [B] float64."""
    return torch.linalg.vector_norm((x.double() - x0.double()).flatten(1), _ORDER[norm], dim=1)


def min_norm(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "l2",
    steps: int = 20,
    search_steps: int = 10,
    eps_max: PerSample | None = None,
    tolerance: float = 0.02,
    loss: Loss = "dlr",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
) -> MinNormResult:
    """Smallest perturbation in ``norm`` that changes the decision, by a bracketed search over eps for each image.

    The first radius is twice the one at which the margin's linearisation crosses zero. It is quadrupled while
    :func:`pgd` fails and bisected (geometrically) once it has succeeded; what succeeded is pulled back to the decision
    boundary along the segment to its input, and the next, smaller ball is searched from there. Deterministic: the
    first run starts at the input. Images whose bracket has closed drop out.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        steps: gradient steps at each radius.
        search_steps: radii tried for each image.
        eps_max: largest radius of interest, float or [B]; the box's diameter if None.
        tolerance: relative width at which a bracket is closed.
        loss: as in :func:`pgd`.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        sparsity: as in :func:`pgd`.
        targets: classes to reach, [B] int64.
        active: [B] bool; False leaves an image out (unchanged, distance inf, not found).

    Returns:
        The smallest perturbations found.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.
    """
    check_loss(loss)
    if norm not in _ORDER:
        raise ValueError(f"norm must be one of {', '.join(_ORDER)}, got {norm!r}")
    if search_steps < 1:
        raise ValueError(f"search_steps must be at least 1, got {search_steps}")
    with attacked(model) as network:
        batch = new_batch(inputs, labels, targets, eps=0.0, step_size=0.0, bounds=bounds, ids=None)
        if eps_max is None:
            limit = _largest_radius(inputs, norm, bounds)
        elif isinstance(eps_max, Tensor):
            check_vector(eps_max, "eps_max", inputs)
            limit = eps_max.double()
        else:
            limit = torch.full(inputs.shape[:1], eps_max, dtype=torch.float64, device=inputs.device)
        search = _Search(inputs, limit)
        search.open[rows_of(active, inputs)] = True
        search.begin(*_first_radius(network, batch, inputs.dtype, norm))
        for _ in range(search_steps):
            rows = search.open.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            part, originals = batch.take(rows), take(search.inputs, rows)
            found = pgd(
                network,
                originals,
                part.labels,
                norm=norm,
                eps=search.radius[rows],
                steps=steps,
                loss=loss,
                random_start=False,
                start=take(search.best, rows),
                bounds=part.bounds,
                sparsity=sparsity,
                targets=part.targets,
            )
            hit, found = _pull_back(network, found, originals, part)
            search.update(rows, hit, found, distance(found, originals, norm), tolerance)
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


def _largest_radius(
    inputs: Tensor,  # [B, ...]
    norm: Norm,
    bounds: Bounds,
) -> Tensor:
    """Diameter of the box, [B] float64."""
    lo, hi = (torch.as_tensor(b, dtype=torch.float64, device=inputs.device).expand(inputs.shape) for b in bounds)
    return torch.linalg.vector_norm((hi - lo).flatten(1), _ORDER[norm], dim=1)


def _first_radius(
    model: Model,
    batch: Batch,
    dtype: torch.dtype,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """Radius at which the linearised margin is zero, [B] float64, and which images are misclassified, [B] bool."""
    x = batch.x0.to(dtype, copy=True).requires_grad_()
    logits = logits_of(model, x)
    check_classes(batch, logits)
    margin = attack_loss("margin", logits, batch.labels, batch.targets)
    (grad,) = torch.autograd.grad(margin.sum(), x)
    slope = torch.linalg.vector_norm(grad.nan_to_num().flatten(1).double(), _DUAL[norm], dim=1)
    estimate = (-margin.detach().double() / slope).nan_to_num(nan=torch.inf)
    return estimate.clamp_min(_LEAST_RADIUS), succeeded(logits.detach(), batch.labels, batch.targets)


@torch.no_grad()
def _pull_back(
    model: Model,
    x: Tensor,  # [K, ...]
    x0: Tensor,  # [K, ...]
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """Whether ``x`` is misclassified, [K] bool, and the point nearest to ``x0`` on their segment that still is."""
    hit = succeeded(logits_of(model, x), batch.labels, batch.targets)
    best = x.clone()
    near, far = torch.zeros_like(hit, dtype=torch.float64), torch.ones_like(hit, dtype=torch.float64)
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        share = middle.reshape(-1, *([1] * (x.dim() - 1)))
        # In float64 and rounded once, so that a point between two points of the box stays inside it.
        point = (x0.double() + share * (x.double() - x0.double())).to(x.dtype)
        fell = hit & succeeded(logits_of(model, point), batch.labels, batch.targets)
        best = torch.where(fell.reshape(share.shape), point, best)
        near, far = torch.where(fell, near, middle), torch.where(fell, middle, far)
    return hit, best
