"""What is measured on the test images, per image and for one trained model: arrays [N], ready for the disk.

Perturbed images are judged again by the network itself in one pass of their own, so that every stored prediction,
distortion and stretch belongs to exactly the perturbed image that was found.
"""

import copy
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastlip import local_lipschitz
from fastlip.attacks import gaussian_noise, min_norm, min_sigma, pgd
from fastlip.data import ImageSet
from fastlip.metrics import average_distortion, layer_stretch
from fastlip.study.settings.attacks import Ball
from fastlip.study.settings.settings import Settings

Arrays = dict[str, np.ndarray]
Progress = Callable[[int, int, str], None]
Attack = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]

#: Images whose pixels are stored beside the numbers, for a reader to look at.
KEPT = 64


class Images:
    """The evaluated images, their labels, and their numbers, from which their random draws follow."""

    def __init__(self, images: ImageSet, device: torch.device, batch_size: int) -> None:
        self.pixels = images.images  # [N, C, H, W] uint8
        self.labels = images.labels.to(device)  # [N] int64
        self.ids = torch.arange(len(images), device=device)
        self.device = device
        self.batch_size = batch_size
        self.part = (0, 1)

    def share(self, rank: int, size: int) -> "Images":
        """The same images, of which :meth:`batches` gives every ``size``-th batch from ``rank`` on."""
        part = copy.copy(self)
        part.part = (rank, size)
        return part

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, progress: Progress) -> Iterator[slice]:
        """Rows of each batch; ``progress`` hears of each one that is done."""
        n, (rank, size) = len(self), self.part
        for i in range(rank * self.batch_size, n, size * self.batch_size):
            progress(i, n, "")
            yield slice(i, min(i + self.batch_size, n))
        progress(n, n, "")

    def first(self, n: int) -> "Images":
        """The first ``n`` of them, or all if there are fewer."""
        part = copy.copy(self)
        part.pixels, part.labels, part.ids = self.pixels[:n], self.labels[:n], self.ids[:n]
        return part

    def at(self, rows: slice) -> Tensor:
        """Images in [0, 1], float32, channels_last."""
        x = self.pixels[rows].to(self.device).float().div_(255)
        return x.contiguous(memory_format=torch.channels_last)


def depth_points(model: nn.Module) -> list[str]:
    """Modules of a ResNet after which stretch is observed: its stem and every residual block."""
    found = [name for name, module in model.named_modules() if isinstance(module, BasicBlock | Bottleneck)]
    return ["network.maxpool", *found] if found else []


def clean(model: nn.Module, images: Images, progress: Progress) -> Arrays:
    """Predictions and margins on clean images, and the first :data:`KEPT` images themselves.

    The margin is the label's logit minus the largest other one, below 0 where the decision is wrong.
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
    return joined(parts)


def gaussian(model: nn.Module, images: Images, sigma: float, seed: int, progress: Progress) -> Arrays:
    """Gaussian noise of standard deviation ``sigma``."""

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
    """PGD in ``ball``; ``noise_prediction`` is what Gaussian noise as long (L2) as an image's perturbation does."""

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return pgd_attack(model, ball, settings, x, y, ids, generator)

    return perturbed(model, images, attack, seed, progress, control=True)


def pgd_attack(
    model: nn.Module, ball: Ball, settings: Settings, x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator
) -> Tensor:
    """The study's PGD in ``ball``; images like ``x``."""
    norm, _, eps = ball
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
        ids=ids,
        generator=generator,
    )


def smallest_adversarial(model: nn.Module, images: Images, settings: Settings, progress: Progress) -> Arrays:
    """The smallest L2 perturbation found by PGD; ``distortion`` is inf where none was found."""

    def search(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return min_norm(
            model,
            x,
            y,
            norm="l2",
            steps=settings.smallest.steps,
            search_steps=settings.smallest.searches,
            loss=settings.pgd.loss,
        ).adversarial

    return _censored(perturbed(model, images, search, 0, progress, keep=KEPT))


def smallest_gaussian(model: nn.Module, images: Images, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """The smallest Gaussian perturbation found along drawn directions; ``distortion`` is inf where none was found."""

    def search(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
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

    return _censored(perturbed(model, images, search, seed, progress, keep=KEPT))


def gaussian_of_norm(model: nn.Module, images: Images, l2: np.ndarray, seed: int, progress: Progress) -> Arrays:
    """Gaussian noise rescaled per image to the L2 norms ``l2`` [N], those of the smallest adversarial perturbations."""
    lengths = torch.as_tensor(l2, dtype=torch.float32, device=images.device)

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return gaussian_noise(x, norm=lengths[ids], ids=ids, generator=generator)

    return perturbed(model, images, attack, seed, progress)


def jacobian(model: nn.Module, images: Images, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """Norm of the Jacobian of the logits at each of the first images, from below."""
    chosen = images.first(settings.lipschitz.jacobian_images)
    parts = []
    for rows in chosen.batches(progress):
        generator = torch.Generator().manual_seed(seed)
        steps = settings.lipschitz.jacobian_steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own forward-mode rules still script
            norm = local_lipschitz(model, chosen.at(rows), max_steps=steps, generator=generator)
        parts.append({"id": chosen.ids[rows], "norm": norm})
    return joined(parts)


def perturbed(
    model: nn.Module,
    images: Images,
    attack: Attack,
    seed: int,
    progress: Progress,
    keep: int = 0,
    control: bool = False,
) -> Arrays:
    """What became of each image under ``attack``, and the perturbed pixels of the first ``keep``.

    ``stretch`` is that at the logits, and ``depth_stretch`` [N, D] that at :func:`depth_points`.
    """
    points = depth_points(model)
    parts = []
    for rows in images.batches(progress):
        x, y = images.at(rows), images.labels[rows]
        # The same state for each batch: an image's draws follow from its id, however images are batched.
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
    return joined(parts)


def joined(parts: list[dict[str, Tensor]]) -> Arrays:
    """Batches one after the other; nothing where this process had none."""
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in (parts[0] if parts else ())}


def _censored(arrays: Arrays) -> Arrays:
    if not arrays:
        return arrays
    found = arrays["prediction"] != arrays["label"]
    distortion = np.where(found, arrays["distortion"], np.inf)
    return arrays | {"found": found, "distortion": distortion}


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)
