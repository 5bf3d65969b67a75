"""The stronger suite: APGD with cross-entropy, APGD towards targets, and a black-box attack (Square)."""

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
    """The attacks one after the other, each on the images that stand after those before it.

    Returns:
        As of any attack, for the first perturbation that changed the decision or the last one tried; and
        "stands/<attack>" [N] bool, whether an image stands after that attack and all before it.
    """
    norm, _, eps = ball
    members = {
        "APGD, cross-entropy": partial(apgd, loss="ce", steps=settings.steps, restarts=settings.restarts),
        "APGD, targeted": partial(apgd, loss="dlr", steps=settings.steps, target_classes=settings.targets),
        "Square": partial(square, queries=settings.queries),
    }
    stands: dict[str, list[Tensor]] = {name: [] for name in members}

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            standing = model(x).argmax(1) == y
        best = x
        for name, member in members.items():
            if bool(standing.any()):
                found = member(model, x, y, norm=norm, eps=eps, active=standing, ids=ids, generator=generator)
                best = torch.where(standing[:, None, None, None], found, best)
                with torch.no_grad():
                    standing = standing & (model(best).argmax(1) == y)
            stands[name].append(standing)
        return best

    arrays = perturbed(model, images, attack, seed, progress)
    return arrays | {f"stands/{name}": torch.cat(found).cpu().numpy() for name, found in stands.items() if found}
