"""Randomised smoothing (Cohen, Rosenfeld and Kolter 2019): certificates for the majority decision under Gaussian noise.

A certificate is about the smoothed classifier, which returns the class that the network decides for most often under
noise, and not about the network itself. Networks trained without noise, as here, are expected to have few certificates.
"""

import torch
from scipy import stats
from torch import Tensor, nn

from fastlip.attacks import gaussian_noise
from fastlip.metrics import clopper_pearson
from fastlip.study.measure.images import Arrays, Images, Progress, concatenated
from fastlip.study.settings.measurements import SmoothingSettings


def certified_radius(successes: int, n: int, sigma: float, alpha: float) -> float:
    """L2 radius within which the smoothed decision cannot change, with probability 1 - ``alpha``; 0 for none.

    It is ``sigma`` times the normal quantile of the one-sided lower confidence limit of the class's probability
    (Theorem 1 and procedure Certify of the paper).
    """
    low = clopper_pearson(successes, n, 1 - 2 * alpha).low
    return sigma * float(stats.norm.ppf(low)) if low > 0.5 else 0.0


def smoothed(model: nn.Module, images: Images, settings: SmoothingSettings, seed: int, progress: Progress) -> Arrays:
    """The smoothed class of each image, how often the network chose it, and its certified radius (0: abstains)."""
    chosen = images.first(settings.images)
    parts = []
    for rows in chosen.batches(progress):
        x = chosen.at(rows)
        # One generator serves both rounds, so that the certifying draws are independent of the selecting ones.
        generator = torch.Generator(chosen.device).manual_seed(seed)
        votes = _votes(model, x, chosen.ids[rows], settings.sigma, settings.selection, generator, images.batch_size)
        top = votes.argmax(1)
        votes = _votes(model, x, chosen.ids[rows], settings.sigma, settings.samples, generator, images.batch_size)
        hits = votes.gather(1, top[:, None]).squeeze(1)
        radii = [certified_radius(k, settings.samples, settings.sigma, settings.alpha) for k in hits.tolist()]
        part = {
            "id": chosen.ids[rows],
            "label": chosen.labels[rows],
            "prediction": top,
            "count": hits,
            "radius": torch.tensor(radii, dtype=torch.float64),
        }
        parts.append(part)
    return concatenated(parts)


def _votes(
    model: nn.Module, x: Tensor, ids: Tensor, sigma: float, draws: int, generator: torch.Generator, batch_size: int
) -> Tensor:
    """How often the network decides for each class under noise without clipping, [B, C] int64.

    As many draws as make up a batch share a forward pass.
    """
    at_once = max(batch_size // len(x), 1)
    votes: Tensor | None = None
    for done in range(0, draws, at_once):
        noisy = [
            gaussian_noise(x, sigma=sigma, bounds=(-torch.inf, torch.inf), ids=ids, generator=generator)
            for _ in range(min(at_once, draws - done))
        ]
        with torch.no_grad():
            logits = model(torch.cat(noisy))
        if votes is None:
            votes = torch.zeros(len(x), logits.shape[1], dtype=torch.int64, device=x.device)
        decisions = logits.argmax(1).reshape(len(noisy), len(x)).T
        votes.scatter_add_(1, decisions, torch.ones_like(decisions))
    assert votes is not None
    return votes
