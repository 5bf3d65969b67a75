"""The smallest Gaussian noise that changes a decision, by a search over sigma along drawn directions."""

import math

import torch
from torch import Tensor

from fastlip.attacks._arguments import (
    check_classes,
    check_generator,
    check_model,
    check_vector,
    checked_inputs,
    checked_integers,
    count,
    number,
)
from fastlip.attacks._batch import new_batch, rows_where, take
from fastlip.attacks._criterion import Criterion, check_criterion, fooled
from fastlip.attacks._min_norm import MinNormResult
from fastlip.attacks._model import Model, eval_mode, logits_of
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
    criterion: Criterion | None = None,
    bounds: Bounds = (0.0, 1.0),
    active: Tensor | None = None,  # [B] bool
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
) -> MinNormResult:
    """Smallest sigma at which clip(x + sigma z) is misclassified for one of the drawn standard normal z.

    Sigma increases over a geometric grid of ``levels`` from ``sigma_min`` to ``sigma_max``. At the first level at which
    any of an image's directions changes the decision, the interval below the level is bisected with the directions that
    still change it. A direction along which the decision changes and changes back between two levels is missed.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        directions: number of noise tensors drawn for each image.
        sigma_max: largest sigma tried; far above the width of the box the clipped image no longer changes.
        sigma_min: smallest sigma of the grid.
        levels: number of sigmas in the grid.
        halvings: number of (geometric) bisections of the interval found.
        criterion: as in :func:`pgd`.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        active: [B] bool; False leaves an image out, which then comes back unchanged and not found, at distance inf.
        ids: [B] int64 sample ids; 0 .. B-1 if None.
        generator: source of the directions, advanced by one draw for each; the device's default generator if None.

    Returns:
        Misclassified noisy images and the sigma of each as ``distance``.

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
        >>> smallest = attacks.min_sigma(model, images, labels, generator=torch.Generator().manual_seed(0))
        >>> print(smallest.distance)
    """
    check_model(model)
    inputs, bounds = checked_inputs(inputs, bounds)
    labels = checked_integers(labels, "labels", inputs)
    if active is not None:
        check_vector(active, "active", inputs, torch.bool)
    ids = None if ids is None else checked_integers(ids, "ids", inputs)
    check_generator(generator)
    check_criterion(criterion)
    directions, levels = count(directions, "directions", 1), count(levels, "levels", 2)
    halvings = count(halvings, "halvings")
    sigma_min, sigma_max = number(sigma_min, "sigma_min"), number(sigma_max, "sigma_max")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got {sigma_min}, {sigma_max}"
        )
    with eval_mode(network_of(model, inputs, fast=False, precision=None)) as network, torch.no_grad():
        batch = new_batch(inputs, labels, None, eps=0.0, step_size=0.0, bounds=bounds, ids=ids)
        size, device = inputs.shape[0], inputs.device
        noises = [standard_normal(batch.x0, ids=batch.ids, generator=generator) for _ in range(directions)]
        best = inputs.detach().clone()
        smallest = torch.full((size,), torch.inf, dtype=torch.float64, device=device)
        robust = torch.ones(size, dtype=torch.bool, device=device) if active is None else active.clone()
        adversarial_along = torch.zeros(directions, size, dtype=torch.bool, device=device)

        def try_noise(sigma: Tensor, rows: Tensor, direction: int | None) -> Tensor:
            """Which of ``rows`` are misclassified at ``sigma`` [B], [K] bool; the smallest such noise is kept."""
            if len(rows) == 0:
                return torch.zeros(0, dtype=torch.bool, device=device)
            chosen = batch.take(rows)
            noisy = chosen.x0
            if direction is not None:
                noisy = add_noise(noisy, take(noises[direction], rows), sigma[rows], chosen.bounds)
            noisy = noisy.to(inputs.dtype)
            logits = logits_of(network, noisy)
            check_classes(logits, labels=chosen.labels)
            adversarial = fooled(criterion, logits, chosen.labels)
            better = adversarial & (sigma[rows] < smallest[rows])
            best[rows[better]] = noisy[better]
            smallest[rows[better]] = sigma[rows[better]]
            return adversarial

        rows = rows_where(robust)
        robust[rows[try_noise(torch.zeros_like(smallest), rows, None)]] = False
        grid = torch.logspace(0, 1, levels, base=sigma_max / sigma_min, dtype=torch.float64).tolist()
        low, high = torch.zeros_like(smallest), torch.zeros_like(smallest)
        for level in grid:
            rows = rows_where(robust)
            sigma = torch.full_like(smallest, level * sigma_min)
            for direction in range(directions):
                adversarial_along[direction, rows] = try_noise(sigma, rows, direction)
            high[rows] = sigma[rows]
            robust &= ~adversarial_along.any(0)
            low[robust] = sigma[robust]
        for _ in range(halvings):
            middle = torch.where(low > 0, (low * high).sqrt(), high / 2)
            now = torch.zeros_like(adversarial_along)
            for direction in range(directions):
                rows = rows_where(adversarial_along[direction])
                now[direction, rows] = try_noise(middle, rows, direction)
            adversarial = now.any(0)
            high = torch.where(adversarial, middle, high)
            low = torch.where(adversarial | ~adversarial_along.any(0), low, middle)
            adversarial_along = torch.where(adversarial, now, adversarial_along)
    return MinNormResult(adversarial=best, distance=smallest, found=smallest.isfinite(), searched=low)
