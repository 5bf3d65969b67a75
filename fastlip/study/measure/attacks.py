"""The attacks of the study: Gaussian noise, PGD, and searches for the smallest perturbations.

Gradients are those of a faster copy of the network (:func:`fastlip.attacks.prepare`), which all attacks on it share;
the network itself confirms every success, in float32.

What a search does not find is censored at its ceiling, the largest distortion that it tries.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fastlip.attacks import AttackWarning, gaussian_noise, min_norm, min_sigma, pgd
from fastlip.metrics import average_distortion
from fastlip.study.measure.images import KEPT, Arrays, Images, Progress
from fastlip.study.measure.perturbed_images import perturbed
from fastlip.study.settings.attacks import Ball
from fastlip.study.settings.settings import Settings


def gaussian(model: nn.Module, images: Images, sigma: float, seed: int, progress: Progress) -> Arrays:
    """Measurements under Gaussian noise of standard deviation ``sigma``."""

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return gaussian_noise(x, sigma=sigma, ids=ids, generator=generator)

    return perturbed(model, images, attack, seed, progress)


def projected_gradient(
    model: nn.Module,
    images: Images,
    ball: Ball,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> Arrays:
    """Measurements under PGD in ``ball``, with Gaussian noise of the same L2 norm as the control."""

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return pgd_attack(model, ball, settings, x, y, ids, generator)

    return perturbed(model, images, attack, seed, progress, control=True)


def pgd_attack(
    model: nn.Module,
    ball: Ball,
    settings: Settings,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    generator: torch.Generator,
    early_stop: bool = True,
) -> Tensor:
    """Images like ``x``, perturbed by the study's PGD in ``ball``; ``early_stop`` as in :func:`fastlip.attacks.pgd`."""
    norm, _, eps = ball
    with _any_accuracy():
        return pgd(
            model,
            x,
            y,
            norm=norm,
            eps=eps,
            steps=settings.pgd.steps,
            step_size=settings.pgd.relative_step * eps / settings.pgd.steps,
            loss=settings.pgd.loss,
            restarts=settings.pgd.restarts,
            early_stop=early_stop,
            ids=ids,
            generator=generator,
            fast=True,
        )


@contextmanager
def _any_accuracy() -> Iterator[None]:
    """No warning that most images are misclassified: epochs are measured from the first on, with their accuracy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        yield


def smallest_adversarial(model: nn.Module, images: Images, settings: Settings, progress: Progress) -> Arrays:
    """Measurements of the smallest L2 perturbations that PGD finds.

    "distortion" is inf where it finds none, "found" [N] says where it does, and "ceiling" [N] is the largest distortion
    that it tried where it found none, and the largest there is, 1, elsewhere.
    """
    searched = []

    def search(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        with _any_accuracy():
            found = min_norm(
                model,
                x,
                y,
                norm="l2",
                method="search",
                steps=settings.smallest.steps,
                search_steps=settings.smallest.searches,
                loss=settings.pgd.loss,
                fast=True,
            )
        assert found.searched is not None
        # Distortion is the L2 norm over the square root of the number of pixel values.
        searched.append((found.searched / x[0].numel() ** 0.5).clamp_max(1.0).cpu())
        return found.adversarial

    arrays = perturbed(model, images, search, 0, progress, keep=KEPT)
    if not arrays:
        return arrays
    tried = torch.cat(searched).numpy()
    return _censored(arrays, np.where(arrays["prediction"] == arrays["label"], tried, 1.0))


def smallest_gaussian(model: nn.Module, images: Images, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """The same for the smallest Gaussian perturbations found along randomly drawn directions.

    "ceiling" is the distortion of the strongest noise that is tried on an image, after clipping.
    """
    ceilings = []

    def search(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        again = generator.clone_state()
        strongest = [
            average_distortion(gaussian_noise(x, sigma=settings.smallest.max_sigma, ids=ids, generator=again), x)
            for _ in range(settings.smallest.directions)
        ]
        ceilings.append(torch.stack(strongest).amax(0).cpu())
        return min_sigma(
            model,
            x,
            y,
            directions=settings.smallest.directions,
            sigma_max=settings.smallest.max_sigma,
            levels=settings.smallest.levels,
            halvings=settings.smallest.halvings,
            ids=ids,
            generator=generator,
        ).adversarial

    arrays = perturbed(model, images, search, seed, progress, keep=KEPT)
    return _censored(arrays, torch.cat(ceilings).numpy() if ceilings else np.zeros(0))


def gaussian_of_norm(model: nn.Module, images: Images, l2: np.ndarray, seed: int, progress: Progress) -> Arrays:
    """Measurements under Gaussian noise that has, on each image, the L2 norm given in ``l2`` [N]."""
    lengths = torch.as_tensor(l2, dtype=torch.float32, device=images.device)

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return gaussian_noise(x, norm=lengths[ids], ids=ids, generator=generator)

    return perturbed(model, images, attack, seed, progress)


def _censored(
    arrays: Arrays,
    ceiling: np.ndarray,  # [N]
) -> Arrays:
    if not arrays:
        return arrays
    found = arrays["prediction"] != arrays["label"]
    distortion = np.where(found, arrays["distortion"], np.inf)
    return arrays | {"found": found, "distortion": distortion, "ceiling": ceiling}
