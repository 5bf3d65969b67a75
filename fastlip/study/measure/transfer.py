"""Transfer of adversarial examples from one model to another (Szegedy et al. 2013, section 4.2).

Perturbations are compared at one L2 norm: the direction is that of a strong adversarial perturbation of the source
model, and its length is scaled as x' = clip(x + s d, 0, 1) with the s for which x' - x has the norm wanted *after*
clipping. The control is Gaussian noise that is clipped and scaled in the same way. Where the box has no room for the
norm along one of the two directions, both have the smaller norm that is in reach.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastlip import ops
from fastlip.attacks import gaussian_noise
from fastlip.study.measure.attacks import pgd_attack
from fastlip.study.measure.images import Arrays, Images, Progress, concatenated
from fastlip.study.settings.attacks import Ball
from fastlip.study.settings.settings import Settings

#: Directions are lengthened by this before they are projected onto the ball and the box, so that all reach its surface.
_FAR = 1e4


def adversarial_images(model: nn.Module, images: Images, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """Adversarial images of ``model`` at each of the L L2 norms ``settings.transfer.l2``.

    An image that the model misclassifies as it is has no adversarial perturbation and is left as it is.

    Returns:
        "id" and "label" [N], "perturbed" [N, L, C, H, W] float32, and "l2" [N, L], the norms that were reached.
    """
    parts = []
    for rows in images.batches(progress):
        x, y = images.at(rows), images.labels[rows]
        made = []
        for length in settings.transfer.l2:
            generator = torch.Generator(images.device).manual_seed(seed)
            # The first draw, which judged() repeats.
            noise = gaussian_noise(x, norm=length, ids=images.ids[rows], generator=generator)
            ball: Ball = ("l2", length, length)
            found = pgd_attack(model, ball, settings, x, y, images.ids[rows], generator, early_stop=False)
            made.append(scaled(found, x, _reached(noise.double() - x.double(), length)))
        perturbed = torch.stack(made, 1).contiguous()
        moved = perturbed.double() - x[:, None].double()
        parts.append({"id": images.ids[rows], "label": y, "perturbed": perturbed, "l2": moved.flatten(2).norm(dim=2)})
    return concatenated(parts)


def scaled(
    perturbed: Tensor,  # [B, C, H, W]
    inputs: Tensor,  # [B, C, H, W]
    length: Tensor,  # [B]
) -> Tensor:
    """Images in [0, 1] whose perturbations have the directions of ``perturbed - inputs`` and the L2 norms ``length``.

    Where the box has no room for the norm, the image is at the bounds; an unperturbed image stays as it is.
    """
    direction = perturbed.double() - inputs.double()
    norm = direction.flatten(1).norm(dim=1)[:, None, None, None]
    unit = torch.where(norm > 0, direction / norm, 0.0)
    x = inputs.double()
    return ops.project_(x + _FAR * unit, x, eps=length, norm="l2", bounds=(0.0, 1.0)).to(inputs.dtype)


def judged(
    model: nn.Module,
    images: Images,
    made: Mapping[str, Arrays],
    norms: Sequence[float],
    seed: int,
    progress: Progress,
) -> Arrays:
    """What ``model`` decides for the adversarial images of S models, and for Gaussian noise of the same norms.

    Args:
        model: the trained network that judges.
        images: the clean images, of which the adversarial ones were made.
        made: what :func:`adversarial_images` returned for each model, by its name.
        norms: the L norms.
        seed: that of the adversarial images.
        progress: called for each model.

    Returns:
        "source" names [S], "strength" [L], "label" [N], and "prediction" and "noise_prediction" [S, L, N].
    """
    shape = (len(made), len(norms), len(images))
    found = {name: np.empty(shape, dtype=np.int64) for name in ("prediction", "noise_prediction")}
    known: dict[tuple[int, float], int] = {}
    for i, (name, arrays) in enumerate(made.items()):
        progress(i, len(made), f"adversarial images of {name}")
        for j, length in enumerate(norms):
            found["prediction"][i, j] = _decisions(model, images, torch.from_numpy(arrays["perturbed"][:, j]))
            # Rounding aside, nearly all perturbations have the same norm: one noisy image serves many sources.
            lengths = _snapped(torch.from_numpy(arrays["l2"][:, j]), length).numpy()
            found["noise_prediction"][i, j] = _under_noise(model, images, lengths, seed, known)
    return {
        "source": np.array(list(made)),
        "strength": np.array(norms, dtype=np.float64),
        "label": images.labels.cpu().numpy(),
        **found,
    }


def _reached(
    perturbation: Tensor,  # [B, C, H, W]
    length: float,
) -> Tensor:
    """The L2 norm of each perturbation, which was to be ``length``; [B] float64."""
    return _snapped(perturbation.flatten(1).norm(dim=1), length)


def _snapped(
    norm: Tensor,  # [B]
    length: float,
) -> Tensor:
    """``norm``, and ``length`` itself where nothing but rounding parts the two."""
    return torch.where(norm > (1 - 1e-5) * length, length, norm)


def _decisions(
    model: nn.Module,
    images: Images,
    pixels: Tensor,  # [N, C, H, W] float32
) -> np.ndarray:
    """The decision for each of ``pixels``, [N] int64."""
    found = []
    for rows in images.batches(lambda done, total, note: None):
        x = pixels[rows].to(images.device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            found.append(model(x).argmax(1))
    decisions: np.ndarray = torch.cat(found).cpu().numpy()
    return decisions


def _under_noise(
    model: nn.Module,
    images: Images,
    lengths: np.ndarray,  # [N]
    seed: int,
    known: dict[tuple[int, float], int],
) -> np.ndarray:
    """The decision for each image under noise of its length, [N] int64; those that are ``known`` are not made again."""
    keys = list(enumerate(lengths.tolist()))
    left = torch.tensor([row for row, length in keys if (row, length) not in known], dtype=torch.int64)
    norm = torch.as_tensor(lengths, dtype=torch.float32)
    for rows in left.split(images.batch_size):
        x = images.pixels[rows].to(images.device).float().div_(255).contiguous(memory_format=torch.channels_last)
        # An image's noise depends on its id and the generator's state, not on the batch.
        generator = torch.Generator(images.device).manual_seed(seed)
        ids = images.ids[rows.to(images.device)]
        noisy = gaussian_noise(x, norm=norm[rows].to(images.device), ids=ids, generator=generator)
        with torch.no_grad():
            decisions = model(noisy).argmax(1).tolist()
        known.update({(row, float(lengths[row])): d for row, d in zip(rows.tolist(), decisions, strict=True)})
    return np.array([known[key] for key in keys])
