"""Singular values of the weights, and of the features of clean, noisy and adversarial images."""

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from fastlip.attacks import gaussian_noise
from fastlip.study.measure.attacks import pgd_attack
from fastlip.study.measure.images import Arrays, Images, Progress
from fastlip.study.settings.attacks import Ball
from fastlip.study.settings.settings import Settings

#: Modules of the network whose outputs are taken as features, and the names of these stages.
STAGES = {
    "network.maxpool": "stem",
    "network.layer1": "layer1",
    "network.layer2": "layer2",
    "network.layer3": "layer3",
    "network.layer4": "layer4",
    "network.avgpool": "pooled",
    "network.fc": "logits",
}
CONDITIONS = ("clean", "gaussian", "pgd")


def effective_rank(
    values: np.ndarray,  # [K]
) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 where all are 0."""
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def stable_rank(
    values: np.ndarray,  # [K]
) -> float:
    """Sum of the squared singular values over the largest square (Rudelson and Vershynin 2007); 0 where all are 0."""
    top = float(values.max(initial=0.0))
    return float((values**2).sum() / top**2) if top > 0 else 0.0


def singular_values(
    matrix: Tensor,  # [M, N]
) -> np.ndarray:
    """Singular values in descending order, [min(M, N)] float64, computed from the smaller Gram matrix."""
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    squares = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0.0)
    found: np.ndarray = squares.sqrt().flip(0).cpu().numpy()
    return found


def weights(model: nn.Module, start: dict[str, Tensor]) -> Arrays:
    """Singular values of every weight, flattened to [outputs, inputs * kernel], and its distance from ``start``.

    Args:
        model: the trained network.
        start: state dict of the network that its training began from. A weight that is not there, or has another shape
            there (the head's), has the distance NaN.

    Returns:
        "layer": names [L], "distance": ||W - W0|| / ||W0|| [L], and for each name its singular values.
    """
    found: Arrays = {}
    distances = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        found[name] = singular_values(weight.flatten(1))
        before = start.get(f"{name}.weight")
        if before is None or before.shape != weight.shape:
            distances.append(np.nan)
        else:
            before = before.to(weight).double()
            distances.append(float((weight.double() - before).norm() / before.norm()))
    return {"layer": np.array(list(found)), "distance": np.array(distances)} | found


def features(model: nn.Module, images: Images, ball: Ball, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """Spectra of the features of clean, noisy and adversarial images, and the growth of perturbations with depth.

    The adversarial images are those of PGD in ``ball`` with ``seed``; the noisy images have Gaussian noise of the same
    L2 norm. A stage's features form a matrix [images * positions, channels]. Its spectrum is taken after subtracting
    the mean row and dividing by the square root of the number of rows.

    Returns:
        "stage": names [S]; "<condition>/<stage>": singular values; "growth/<condition>": [N, S], the distance of an
        image's features from the clean ones over the norm of the clean ones (0 for an unperturbed image).
    """
    chosen = images.first(settings.features.images)
    named = dict(model.named_modules())
    found_stages = {name: stage for name, stage in STAGES.items() if name in named}
    extract = create_feature_extractor(model, found_stages)
    grams: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    rows_seen: dict[str, int] = {}
    growth: dict[str, list[Tensor]] = {condition: [] for condition in CONDITIONS[1:]}
    for rows in chosen.batches(progress):
        x, y, ids = chosen.at(rows), chosen.labels[rows], chosen.ids[rows]
        generator = torch.Generator(chosen.device).manual_seed(seed)
        attacked = pgd_attack(model, ball, settings, x, y, ids, generator)
        lengths = (attacked.double() - x.double()).flatten(1).norm(dim=1).float()
        generator = torch.Generator(chosen.device).manual_seed(seed)
        noisy = gaussian_noise(x, norm=lengths, ids=ids, generator=generator)
        with torch.no_grad():
            outputs = {c: extract(z) for c, z in zip(CONDITIONS, (x, noisy, attacked), strict=True)}
        for condition, stages in outputs.items():
            for stage, output in stages.items():
                matrix = output.flatten(2).transpose(1, 2).flatten(0, 1) if output.dim() == 4 else output
                matrix, key = matrix.double(), f"{condition}/{stage}"
                grams[key] = grams.get(key, 0) + matrix.T @ matrix
                sums[key] = sums.get(key, 0) + matrix.sum(0)
                rows_seen[key] = rows_seen.get(key, 0) + len(matrix)
            if condition != "clean":
                relative = [_relative(stages[stage], outputs["clean"][stage]) for stage in found_stages.values()]
                growth[condition].append(torch.stack(relative, 1))
    found: Arrays = {"stage": np.array(list(found_stages.values()))}
    for key, gram in grams.items():
        n = rows_seen[key]
        covariance = gram / n - torch.outer(sums[key], sums[key]) / n**2
        squares = torch.linalg.eigvalsh(covariance).clamp_min(0.0).flip(0)
        # Eigenvalues below the rounding error of the sums are noise, and n centred rows span at most n - 1 directions.
        squares = torch.where(squares > 1e-12 * squares[:1], squares, 0.0)
        found[key] = squares.sqrt().cpu().numpy()[: max(n - 1, 1)]
    return found | {f"growth/{c}": torch.cat(parts).cpu().numpy() for c, parts in growth.items()}


def _relative(moved: Tensor, clean: Tensor) -> Tensor:
    """||moved - clean|| / ||clean|| for each image, [B] float64; 0 where both are the same."""
    difference = (moved.double() - clean.double()).flatten(1).norm(dim=1)
    size = clean.double().flatten(1).norm(dim=1)
    return torch.where(difference > 0, difference / size, 0.0)
