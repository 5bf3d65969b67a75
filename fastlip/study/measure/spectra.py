"""Singular values of the weights, and of the features of clean, noisy and adversarial images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastlip.attacks import gaussian_noise
from fastlip.metrics import layer_outputs
from fastlip.models import live_taps, short_name, stored_name
from fastlip.study.measure.attacks import pgd_attack
from fastlip.study.measure.images import Arrays, Images, Progress
from fastlip.study.measure.network_parts import parts_of
from fastlip.study.settings.attacks import Ball
from fastlip.study.settings.settings import Settings

#: What the model's output is called.
LOGITS = "logits"
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


def weights(model: nn.Module, start: dict[str, Tensor], image_shape: Sequence[int]) -> Arrays:
    """Singular values of every weight as it acts on images of one shape, and its distance from ``start``.

    A weight is flattened to [outputs, inputs * taps]. Taps of a convolution that lie beyond its input at every
    position are left out of all numbers: they multiply zeros, so that training does not reach them.

    Args:
        model: the trained network.
        start: state dict of the network that its training began from. A weight that is not there, or has another shape
            there (the head's), has the distance NaN.
        image_shape: [C, H, W] of one image.

    Returns:
        "layer": names in the state dict [L], "distance": ||W - W0|| / ||W0|| [L], "dead_taps": share of taps left out
        [L], and for each name its singular values.
    """
    found: Arrays = {}
    distances, dead = [], []
    live = live_taps(model, image_shape)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        taps = live.get(name, torch.ones(weight.shape[2:], dtype=torch.bool)).to(weight.device)
        used = weight[..., taps] if taps.dim() else weight
        stored = stored_name(model, name)
        found[stored] = singular_values(used.flatten(1))
        dead.append(1.0 - taps.double().mean().item())
        before = start.get(f"{stored}.weight")
        if before is None or before.shape != weight.shape:
            distances.append(np.nan)
        else:
            before = before.to(weight)
            before = (before[..., taps] if taps.dim() else before).double()
            distances.append(float((used.double() - before).norm() / before.norm()))
    return {"layer": np.array(list(found)), "distance": np.array(distances), "dead_taps": np.array(dead)} | found


def features(model: nn.Module, images: Images, ball: Ball, settings: Settings, seed: int, progress: Progress) -> Arrays:
    """Spectra of the features of clean, noisy and adversarial images, and the growth of perturbations with depth.

    The adversarial images are those of PGD in ``ball`` with ``seed``; the noisy images have Gaussian noise of the same
    L2 norm. A stage's features form a matrix [images * positions, channels]. Its spectrum is taken after subtracting
    the mean row and dividing by the square root of the number of rows.

    Returns:
        "stage": names [S], those of the modules, and "logits"; "<condition>/<stage>": singular values;
        "growth/<condition>": [N, S], the distance of an image's features from the clean ones over the norm of the clean
        ones (0 for an unperturbed image).
    """
    chosen = images.first(settings.features.images)
    parts = parts_of(model, images)
    # The logits are what the model returns, which may be more than what its head does.
    modules = {short_name(name): name for name in parts.stages} | {LOGITS: ""}
    spectra: dict[str, Spectrum] = {}
    growth: dict[str, list[Tensor]] = {condition: [] for condition in CONDITIONS[1:]}
    for rows in chosen.batches(progress):
        x, y, ids = chosen.at(rows), chosen.labels[rows], chosen.ids[rows]
        generator = torch.Generator(chosen.device).manual_seed(seed)
        attacked = pgd_attack(model, ball, settings, x, y, ids, generator)
        lengths = (attacked.double() - x.double()).flatten(1).norm(dim=1).float()
        generator = torch.Generator(chosen.device).manual_seed(seed)
        noisy = gaussian_noise(x, norm=lengths, ids=ids, generator=generator)
        outputs = {
            c: layer_outputs(model, z, list(modules.values()))
            for c, z in zip(CONDITIONS, (x, noisy, attacked), strict=True)
        }
        for condition, maps in outputs.items():
            for stage, name in modules.items():
                matrix = as_rows(maps[name]).double()
                key = f"{condition}/{stage}"
                if key not in spectra:
                    spectra[key] = Spectrum(matrix.shape[1], len(matrix) // len(x) * len(chosen))
                spectra[key].add(matrix)
            if condition != "clean":
                relative = [_relative(maps[name], outputs["clean"][name]) for name in modules.values()]
                growth[condition].append(torch.stack(relative, 1))
    found: Arrays = {"stage": np.array(list(modules))}
    found |= {key: spectrum.singular_values() for key, spectrum in spectra.items()}
    return found | {f"growth/{c}": torch.cat(parts_).cpu().numpy() for c, parts_ in growth.items()}


def as_rows(
    output: Tensor,  # [B, C, H, W], [B, H, W, C], [B, N, D], [B, D] or [B, C, ...]
) -> Tensor:
    """A feature map as a matrix [B * positions, channels].

    Tokens [B, N, D] have their channels last; of maps with four axes those whose second and third axis alone are equal,
    as square images make them in transformers that work on maps.
    """
    if output.dim() == 2:
        return output
    last = output.dim() == 3 or (output.dim() == 4 and output.shape[1] == output.shape[2] != output.shape[3])
    channels = output if last else output.movedim(1, -1)
    return channels.flatten(0, -2)


class Spectrum:
    """Singular values of centred rows, from the smaller one of the two Gram matrices."""

    def __init__(self, channels: int, rows: int) -> None:
        self.rows: list[Tensor] = []
        self.wide = channels > rows
        self.gram = self.sum = torch.zeros(())
        self.n = 0

    def add(
        self,
        matrix: Tensor,  # [M, channels] float64
    ) -> None:
        self.n += len(matrix)
        if self.wide:
            self.rows.append(matrix)
        else:
            self.gram = self.gram.to(matrix) + matrix.T @ matrix
            self.sum = self.sum.to(matrix) + matrix.sum(0)

    def singular_values(self) -> np.ndarray:
        """In descending order, over the root of the number of rows, [min(channels, rows - 1)] float64."""
        if self.wide:
            centred = torch.cat(self.rows)
            centred = centred - centred.mean(0)
            covariance = centred @ centred.T / self.n
        else:
            covariance = self.gram / self.n - torch.outer(self.sum, self.sum) / self.n**2
        squares = torch.linalg.eigvalsh(covariance).clamp_min(0.0).flip(0)
        # Eigenvalues below the rounding error of the sums are noise, and n centred rows span at most n - 1 directions.
        squares = torch.where(squares > 1e-12 * squares[:1], squares, 0.0)
        found: np.ndarray = squares.sqrt().cpu().numpy()[: max(self.n - 1, 1)]
        return found


def _relative(moved: Tensor, clean: Tensor) -> Tensor:
    """||moved - clean|| / ||clean|| for each image, [B] float64; 0 where both are the same."""
    difference = (moved.double() - clean.double()).flatten(1).norm(dim=1)
    size = clean.double().flatten(1).norm(dim=1)
    return torch.where(difference > 0, difference / size, 0.0)
