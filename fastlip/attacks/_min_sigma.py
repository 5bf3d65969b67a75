"""The smallest Gaussian noise that changes a decision, by a search over sigma along drawn directions."""

import math

import torch
from torch import Tensor

from fastlip.attacks._arguments import check_generator, count, number
from fastlip.attacks._batch import check_classes, new_batch, rows_of, take, within
from fastlip.attacks._losses import succeeded
from fastlip.attacks._min_norm import MinNormResult
from fastlip.attacks._model import Model, attacked, logits_of
from fastlip.attacks._noise import add_noise, standard_normal
from fastlip.attacks._prepare import network_of
from fastlip.ops import Bounds


def min_sigma(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    directions: int = 8,
    sigma_max: float = 4.0,
    sigma_min: float = 2.0**-8,
    levels: int = 11,
    halvings: int = 5,
    bounds: Bounds = (0.0, 1.0),
    active: Tensor | None = None,  # [B] bool
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
) -> MinNormResult:
    """Smallest sigma at which clip(x + sigma z) is misclassified for one of the drawn standard normal z.

    Sigma climbs a geometric grid of ``levels`` from ``sigma_min`` to ``sigma_max``; at the first level at which any of
    an image's directions changes the decision, the interval below it is bisected, keeping the directions that still
    do. A direction along which the decision changes and changes back between two levels is missed there.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        directions: noise tensors drawn for each image.
        sigma_max: largest sigma tried; far above the box's width the clipped image no longer changes.
        sigma_min: smallest level of the grid.
        levels: sigmas in the grid.
        halvings: bisections (geometric) of the interval found.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        active: [B] bool; False leaves an image out (unchanged, distance inf, not found).
        ids: [B] int64 sample ids; 0 .. B-1 if None.
        generator: source of the directions, one draw for each; the device's default generator if None.

    Returns:
        Misclassified noisy images and the sigma of each as ``distance``.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.
    """
    bounds = within(inputs, bounds)
    check_generator(generator)
    directions, levels = count(directions, "directions", 1), count(levels, "levels", 2)
    halvings = count(halvings, "halvings")
    sigma_min, sigma_max = number(sigma_min, "sigma_min"), number(sigma_max, "sigma_max")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got {sigma_min}, {sigma_max}"
        )
    with attacked(network_of(model, inputs, fast=False, precision=None)) as network, torch.no_grad():
        batch = new_batch(inputs, labels, None, eps=0.0, step_size=0.0, bounds=bounds, ids=ids)
        size, device = inputs.shape[0], inputs.device
        noises = [standard_normal(batch.x0, ids=batch.ids, generator=generator) for _ in range(directions)]
        best = inputs.detach().clone()
        smallest = torch.full((size,), torch.inf, dtype=torch.float64, device=device)
        standing = torch.zeros(size, dtype=torch.bool, device=device)
        standing[rows_of(active, inputs)] = True
        fell_along = torch.zeros(directions, size, dtype=torch.bool, device=device)

        def fooled(sigma: Tensor, rows: Tensor, direction: int | None) -> Tensor:
            """Judge ``rows`` at ``sigma`` [B]; keep the noisy images that are misclassified."""
            if len(rows) == 0:
                return torch.zeros(0, dtype=torch.bool, device=device)
            chosen = batch.take(rows)
            noisy = chosen.x0
            if direction is not None:
                noisy = add_noise(noisy, take(noises[direction], rows), sigma[rows], chosen.bounds)
            noisy = noisy.to(inputs.dtype)
            logits = logits_of(network, noisy)
            check_classes(logits, labels=chosen.labels)
            hit = succeeded(logits, chosen.labels, None)
            better = rows[hit & (sigma[rows] < smallest[rows])]
            best[better] = noisy[hit & (sigma[rows] < smallest[rows])]
            smallest[better] = sigma[better]
            return hit

        everyone = standing.nonzero().squeeze(1)
        standing[everyone[fooled(torch.zeros_like(smallest), everyone, None)]] = False
        grid = torch.logspace(0, 1, levels, base=sigma_max / sigma_min, dtype=torch.float64).tolist()
        low, high = torch.zeros_like(smallest), torch.zeros_like(smallest)
        for level in grid:
            rows = standing.nonzero().squeeze(1)
            sigma = torch.full_like(smallest, level * sigma_min)
            for direction in range(directions):
                fell_along[direction, rows] = fooled(sigma, rows, direction)
            high[rows] = sigma[rows]
            fell = standing & fell_along.any(0)
            standing &= ~fell
            low[standing] = sigma[standing]
        for _ in range(halvings):
            middle = torch.where(low > 0, (low * high).sqrt(), high / 2)
            now = torch.zeros_like(fell_along)
            for direction in range(directions):
                rows = fell_along[direction].nonzero().squeeze(1)
                now[direction, rows] = fooled(middle, rows, direction)
            fell = now.any(0)
            high = torch.where(fell, middle, high)
            low = torch.where(fell | ~fell_along.any(0), low, middle)
            fell_along = torch.where(fell, now, fell_along)
    return MinNormResult(adversarial=best, distance=smallest, found=smallest.isfinite())
