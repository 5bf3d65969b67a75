"""torchvision's ResNets on 32x32 images in [0, 1]."""

import socket
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastlip.models._extra import torchvision_models
from fastlip.models._normalize import Normalize

Stem = Literal["imagenet", "cifar"]

#: Channel statistics of ImageNet, the inputs that torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resnet50(
    num_classes: int,
    *,
    stem: Stem = "imagenet",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int | None = None,
) -> nn.Sequential:
    """ResNet-50 (He et al. 2016) with the normalisation inside: ``Sequential(normalize, network)``.

    The last BatchNorm of each block starts at zero, so that training begins with short paths (Goyal et al. 2017).

    Args:
        num_classes: outputs of the head ``network.fc``.
        stem: "imagenet" (7x7 stride 2 and max-pool: 32x32 images end as 1x1 maps) or "cifar" (3x3 stride 1, no pool).
        mean: channel means that are subtracted.
        std: channel standard deviations that are divided by.
        seed: of the initialisation, which then leaves the global random state alone; drawn from it if None.

    Returns:
        A model from images [B, 3, H, W] in [0, 1] to logits [B, num_classes].

    Raises:
        ValueError: a value is out of range.
        ImportError: torchvision is missing.
    """
    return _resnet("resnet50", num_classes, stem, mean, std, seed)


def resnet18(
    num_classes: int,
    *,
    stem: Stem = "imagenet",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int | None = None,
) -> nn.Sequential:
    """ResNet-18, the small reference; arguments, result and errors as in :func:`resnet50`."""
    return _resnet("resnet18", num_classes, stem, mean, std, seed)


def _resnet(
    name: str, num_classes: int, stem: str, mean: Sequence[float], std: Sequence[float], seed: int | None
) -> nn.Sequential:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
    build = getattr(torchvision_models(), name)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        network = build(num_classes=num_classes, zero_init_residual=True)
        if stem == "cifar":
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))


def load_backbone(model: nn.Sequential, state_dict: Mapping[str, Tensor]) -> None:
    """Load everything but the head ``fc`` into the ResNet of :func:`resnet50` or :func:`resnet18`, in place.

    Args:
        model: the model to load into; its normalisation and its head stay as they are.
        state_dict: weights under torchvision's names, bare or behind one common prefix (``network.``, ``module.``).

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ (another architecture or stem).
    """
    network = model.get_submodule("network")
    prefix = next(
        (k.removesuffix("conv1.weight") for k in state_dict if k.endswith("conv1.weight") and "layer" not in k), None
    )
    if prefix is None:
        raise ValueError("state_dict has no key conv1.weight: it holds no ResNet under torchvision's names")
    given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    given = {k: v for k, v in given.items() if not k.startswith("fc.")}
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    for key, value in wanted.items():
        if key not in given:
            raise ValueError(f"state_dict has no {prefix}{key}: it comes from another architecture")
        if given[key].shape != value.shape:
            raise ValueError(
                f"state_dict has {prefix}{key} of shape {list(given[key].shape)} where the model has "
                f"{list(value.shape)}: it comes from another architecture or stem"
            )
    surplus = sorted(given.keys() - wanted.keys())
    if surplus:
        raise ValueError(f"state_dict has {prefix}{surplus[0]}, which the model has not: another architecture")
    network.load_state_dict(given, strict=False)


def imagenet_weights(timeout: float = 10.0) -> dict[str, Tensor]:
    """ResNet-50's ImageNet weights (torchvision, IMAGENET1K_V2), from torch.hub's cache or the network.

    Args:
        timeout: seconds without an answer after which the download is given up.

    Returns:
        The state dict under torchvision's names, on the CPU.

    Raises:
        OSError: they are not in the cache and cannot be downloaded.
        ImportError: torchvision is missing.
    """
    weights = torchvision_models().ResNet50_Weights.IMAGENET1K_V2
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        # check_hash: a download cut short must not become a cache entry.
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise OSError(f"ImageNet weights are neither cached nor to be had from {weights.url}: {error}") from None
    finally:
        socket.setdefaulttimeout(before)
