"""Decisions, distortion and stretch under common corruptions, from CIFAR-10-C's files or generated.

Corruptions generated with torchvision and Pillow have the names of those of Hendrycks and Dietterich (2019) that they
resemble, but strengths of our own for 32x32 images. Their accuracies compare models with each other, not with published
results on CIFAR-10-C.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from fastlip.attacks import gaussian_noise
from fastlip.data import ImageSet
from fastlip.metrics import average_distortion
from fastlip.study.measure.images import Arrays, Images, Progress
from fastlip.study.settings.measurements import GENERATED_CORRUPTIONS

#: Strengths at severities 1 to 5.
_STRENGTHS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.02, 0.04, 0.06, 0.08, 0.1),  # standard deviation
    "gaussian_blur": (0.4, 0.6, 0.8, 1.0, 1.4),  # standard deviation in pixels
    "brightness": (1.1, 1.25, 1.4, 1.6, 1.8),  # factor
    "contrast": (0.75, 0.5, 0.4, 0.25, 0.15),  # factor
    "saturate": (0.5, 0.25, 2.0, 4.0, 8.0),  # factor
    "pixelate": (28, 24, 20, 16, 12),  # pixels along a side
    "jpeg_compression": (80, 60, 40, 25, 15),  # quality
}


def corrupt(
    images: Tensor,  # [B, 3, H, W] uint8
    name: str,
    severity: int,
    seed: int,
) -> Tensor:
    """The images under one corruption at a severity from 1 to 5; uint8, as files would hold them."""
    strength = _STRENGTHS[name][severity - 1]
    if name == "gaussian_noise":
        generator = torch.Generator(images.device).manual_seed(seed)
        return _to_uint8(gaussian_noise(images.float() / 255, sigma=strength, generator=generator))
    found: Tensor = _MADE[name](images, strength)
    return found


def _to_uint8(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _blur(images: Tensor, sigma: float) -> Tensor:
    width = 2 * round(3 * sigma) + 1
    return _to_uint8(functional.gaussian_blur(images.float() / 255, [width, width], [sigma, sigma]))


def _pixelate(images: Tensor, side: float) -> Tensor:
    size = list(images.shape[-2:])
    small = functional.resize(images, [int(side * s / 32) for s in size], antialias=True)
    return functional.resize(small, size, interpolation=functional.InterpolationMode.NEAREST)


def _jpeg(images: Tensor, quality: float) -> Tensor:
    found = np.empty_like(images.cpu().numpy())
    for i, image in enumerate(images.cpu().permute(0, 2, 3, 1).contiguous().numpy()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=int(quality))
        found[i] = np.asarray(Image.open(file)).transpose(2, 0, 1)
    return torch.from_numpy(found).to(images.device)


_MADE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian_blur": _blur,
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturate": functional.adjust_saturation,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg,
}
assert set(GENERATED_CORRUPTIONS) == set(_STRENGTHS) == {"gaussian_noise", *_MADE}


def corrupted(
    model: nn.Module,
    images: Images,
    severities: tuple[int, ...],
    files: Callable[[str, int], ImageSet] | None,
    names: tuple[str, ...],
    seed: int,
    progress: Progress,
) -> Arrays:
    """Predictions on corrupted images, their distortion, and the stretch at the logits.

    Args:
        model: the trained network.
        images: clean images.
        severities: S severities from 1 to 5.
        files: returns the same images from the files of a corruption and severity; None generates them.
        names: K corruptions.
        seed: of the noise.
        progress: called for each corruption and severity.

    Returns:
        "corruption" names [K], "severity" [S], "label" [N], "clean_prediction" [N], and of shape [K, S, N]
        "prediction", "distortion" and "stretch", which is NaN where a corruption left an image as it was.
    """
    shape = (len(names), len(severities), len(images))
    predictions = np.empty(shape, dtype=np.int64)
    distortion, stretch = np.empty(shape), np.empty(shape)
    clean = _logits(model, images)
    for k, name in enumerate(names):
        for j, severity in enumerate(severities):
            progress(k * len(severities) + j, len(names) * len(severities), f"{name}, severity {severity}")
            changed = copy_of(images, files(name, severity).images if files else None, name, severity, seed)
            logits = _logits(model, changed)
            predictions[k, j] = logits.argmax(1).cpu().numpy()
            moved = average_distortion(changed.at(slice(None)), images.at(slice(None)))
            size = images.pixels[0].numel()
            # Distortion is the L2 norm over the square root of the number of pixel values.
            norm = moved * size**0.5
            stretch[k, j] = ((logits.double() - clean.double()).norm(dim=1) / norm).where(norm > 0, torch.nan).cpu()
            distortion[k, j] = moved.cpu()
    return {
        "corruption": np.array(names),
        "severity": np.array(severities),
        "label": images.labels.cpu().numpy(),
        "clean_prediction": clean.argmax(1).cpu().numpy(),
        "prediction": predictions,
        "distortion": distortion,
        "stretch": stretch,
    }


def _logits(model: nn.Module, images: Images) -> Tensor:
    """The logits of all images, [N, classes]."""
    parts = []
    for rows in images.batches(lambda done, total, note: None):
        with torch.no_grad():
            parts.append(model(images.at(rows)))
    return torch.cat(parts)


def copy_of(images: Images, pixels: Tensor | None, name: str, severity: int, seed: int) -> Images:
    """``images`` with other pixels: the first of ``pixels``, or corrupted ones of their own where that is None."""
    made = images.first(len(images))
    made.pixels = corrupt(images.pixels, name, severity, seed) if pixels is None else pixels[: len(images)]
    return made
