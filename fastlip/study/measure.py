"""What is measured on the test images, per image and for one trained model: arrays [N], ready for the disk.

Perturbed images are judged again by the network itself in one pass of their own, so that every stored prediction,
distortion and stretch belongs to exactly the perturbed image that was found.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastlip.attacks import gaussian_noise, min_norm, min_sigma, pgd
from fastlip.data import ImageSet
from fastlip.metrics import average_distortion, observed_stretch
from fastlip.study.config import Settings

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

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, progress: Progress) -> Iterator[slice]:
        """Rows of each batch; ``progress`` hears of each one that is done."""
        n = len(self)
        for i in range(0, n, self.batch_size):
            progress(i, n, "")
            yield slice(i, min(i + self.batch_size, n))
        progress(n, n, "")

    def at(self, rows: slice) -> Tensor:
        """Images in [0, 1], float32, channels_last."""
        x = self.pixels[rows].to(self.device).float().div_(255)
        return x.contiguous(memory_format=torch.channels_last)


def clean(model: nn.Module, images: Images, progress: Progress) -> Arrays:
    """Predictions on clean images, and the first :data:`KEPT` images themselves."""
    predictions = []
    for rows in images.batches(progress):
        predictions.append(_predict(model, images.at(rows)))
    return {
        "id": images.ids.cpu().numpy(),
        "label": images.labels.cpu().numpy(),
        "prediction": torch.cat(predictions).cpu().numpy(),
        "image": images.pixels[:KEPT].cpu().numpy(),
    }


def gaussian(model: nn.Module, images: Images, sigma: float, seed: int, progress: Progress) -> Arrays:
    """Gaussian noise of standard deviation ``sigma``."""

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return gaussian_noise(x, sigma=sigma, ids=ids, generator=generator)

    return _perturbed(model, images, attack, seed, progress)


def projected_gradient(
    model: nn.Module,
    images: Images,
    norm: str,
    eps: float,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> Arrays:
    """PGD in the ball of radius ``eps`` in ``norm``."""

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return pgd(
            model,
            x,
            y,
            norm="linf" if norm == "linf" else "l2",
            eps=eps,
            steps=settings.pgd.steps,
            step_size=settings.pgd.relative_step * eps / settings.pgd.steps,
            loss=settings.pgd.loss,
            restarts=settings.pgd.restarts,
            ids=ids,
            generator=generator,
        )

    return _perturbed(model, images, attack, seed, progress)


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

    return _censored(_perturbed(model, images, search, 0, progress, keep=KEPT))


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

    return _censored(_perturbed(model, images, search, seed, progress, keep=KEPT))


def gaussian_of_norm(model: nn.Module, images: Images, l2: np.ndarray, seed: int, progress: Progress) -> Arrays:
    """Gaussian noise rescaled per image to the L2 norms ``l2`` [N], those of the smallest adversarial perturbations."""
    lengths = torch.as_tensor(l2, dtype=torch.float32, device=images.device)

    def attack(x: Tensor, y: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return gaussian_noise(x, norm=lengths[ids], ids=ids, generator=generator)

    return _perturbed(model, images, attack, seed, progress)


def _perturbed(
    model: nn.Module, images: Images, attack: Attack, seed: int, progress: Progress, keep: int = 0
) -> Arrays:
    """What became of each image under ``attack``, and the perturbed pixels of the first ``keep``."""
    parts = []
    for rows in images.batches(progress):
        x, y = images.at(rows), images.labels[rows]
        # The same state for each batch: an image's draws follow from its id, however images are batched.
        generator = torch.Generator(images.device).manual_seed(seed)
        z = attack(x, y, images.ids[rows], generator)
        moved = (z.double() - x.double()).flatten(1)
        part = {
            "id": images.ids[rows],
            "label": y,
            "prediction": _predict(model, z),
            "l2": moved.norm(dim=1),
            "linf": moved.abs().amax(1),
            "distortion": average_distortion(z, x),
            "stretch": observed_stretch(model, z, x),
        }
        if keep:
            part["image"] = z[: max(keep - rows.start, 0)].contiguous()
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _censored(arrays: Arrays) -> Arrays:
    found = arrays["prediction"] != arrays["label"]
    distortion = np.where(found, arrays["distortion"], np.inf)
    return arrays | {"found": found, "distortion": distortion}


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)
