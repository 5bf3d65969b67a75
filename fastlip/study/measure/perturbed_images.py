"""Measurements on perturbed images: decisions, distortion and stretch.

The network judges the perturbed images again in a forward pass of their own, so that every stored prediction,
distortion and stretch belongs to exactly the perturbed image that the attack returned.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlip.attacks import gaussian_noise
from fastlip.metrics import average_distortion, layer_stretch
from fastlip.study.measure.images import Arrays, Images, Progress, concatenated
from fastlip.study.measure.network_parts import parts_of

AttackFunction = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


def perturbed(
    model: nn.Module,
    images: Images,
    attack: AttackFunction,
    seed: int,
    progress: Progress,
    keep: int = 0,
    control: bool = False,
) -> Arrays:
    """Measurements of each image under ``attack``, and the perturbed pixels of the first ``keep`` images.

    "stretch" [N] is the stretch at the logits, and "depth_stretch" [N, D] that at the model's stem and blocks. With
    ``control``, "noise_prediction" [N] is the prediction under Gaussian noise of the perturbation's L2 norm.
    """
    points = parts_of(model, images).points
    parts = []
    for rows in images.batches(progress):
        x, y = images.at(rows), images.labels[rows]
        # Every batch has the same generator state: an image's draws depend on its id and not on the batches.
        generator = torch.Generator(images.device).manual_seed(seed)
        z = attack(x, y, images.ids[rows], generator)
        moved = (z.double() - x.double()).flatten(1)
        stretch = layer_stretch(model, z, x, ["", *points])
        part = {
            "id": images.ids[rows],
            "label": y,
            "prediction": _predict(model, z),
            "l2": moved.norm(dim=1),
            "linf": moved.abs().amax(1),
            "l1": moved.abs().sum(1),
            "distortion": average_distortion(z, x),
            "stretch": stretch[""],
        }
        if points:
            part["depth_stretch"] = torch.stack([stretch[name] for name in points], 1).float()
        if control:
            generator = torch.Generator(images.device).manual_seed(seed)
            noisy = gaussian_noise(x, norm=part["l2"].float(), ids=images.ids[rows], generator=generator)
            part["noise_prediction"] = _predict(model, noisy)
        if keep:
            part["image"] = z[: max(keep - rows.start, 0)].contiguous()
        parts.append(part)
    return concatenated(parts)


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)
