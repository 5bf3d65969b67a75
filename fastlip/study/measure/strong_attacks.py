"""The stronger suite: APGD with cross-entropy, targeted APGD, and a black-box attack (Square)."""

from functools import partial

import torch
from torch import Tensor, nn

from fastlip.attacks import apgd, square
from fastlip.study.measure.images import Arrays, Images, Progress
from fastlip.study.measure.perturbed_images import perturbed
from fastlip.study.settings.attacks import Ball, StrongSuiteSettings


def suite(
    model: nn.Module, images: Images, ball: Ball, settings: StrongSuiteSettings, seed: int, progress: Progress
) -> Arrays:
    """Measurements under the attacks one after the other, each on the images that are still robust.

    Returns:
        The arrays of any attack, for the first perturbation that changes the decision or the last one tried; and
        "stands/<attack>" [N] bool: whether an image is robust to that attack and all before it.
    """
    norm, _, eps = ball
    members = {
        "APGD, cross-entropy": partial(apgd, loss="ce", steps=settings.steps, restarts=settings.restarts),
        "APGD, targeted": partial(apgd, loss="dlr", steps=settings.steps, target_classes=settings.targets),
        "Square": partial(square, queries=settings.queries),
    }
    robust_to: dict[str, list[Tensor]] = {name: [] for name in members}

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            robust = model(x).argmax(1) == y
        best = x
        for name, member in members.items():
            if bool(robust.any()):
                found = member(model, x, y, norm=norm, eps=eps, active=robust, ids=ids, generator=generator, fast=True)
                best = torch.where(robust[:, None, None, None], found, best)
                with torch.no_grad():
                    robust = robust & (model(best).argmax(1) == y)
            robust_to[name].append(robust)
        return best

    arrays = perturbed(model, images, attack, seed, progress)
    return arrays | {f"stands/{name}": torch.cat(found).cpu().numpy() for name, found in robust_to.items() if found}
