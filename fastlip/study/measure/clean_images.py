"""Measurements on clean images: decisions, margins, and norms of the Jacobian of the logits."""

import torch
from torch import nn

from fastlip import local_lipschitz
from fastlip.study.measure.images import KEPT, Arrays, Images, Progress, concatenated
from fastlip.study.settings.settings import Settings


def clean(model: nn.Module, images: Images, progress: Progress) -> Arrays:
    """Predictions and margins on clean images, and the pixels of the first :data:`KEPT` images.

    The margin is the label's logit minus the largest other logit, so it is negative where the decision is wrong.
    """
    parts = []
    for rows in images.batches(progress):
        with torch.no_grad():
            logits = model(images.at(rows)).double()
        labels = images.labels[rows, None]
        own = logits.gather(1, labels).squeeze(1)
        part = {
            "id": images.ids[rows],
            "label": images.labels[rows],
            "prediction": logits.argmax(1),
            "margin": own - logits.scatter(1, labels, -torch.inf).amax(1),
            "image": images.pixels[rows][: max(KEPT - rows.start, 0)],
        }
        parts.append(part)
    return concatenated(parts)


def jacobian(model: nn.Module, images: Images, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """A lower bound on the norm of the Jacobian of the logits at each of the first images."""
    chosen = images.first(settings.lipschitz.jacobian_images)
    parts = []
    for rows in chosen.batches(progress):
        generator = torch.Generator().manual_seed(seed)
        steps = settings.lipschitz.jacobian_steps
        norm = local_lipschitz(model, chosen.at(rows), max_steps=steps, generator=generator)
        parts.append({"id": chosen.ids[rows], "norm": norm})
    return concatenated(parts)
