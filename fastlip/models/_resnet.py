"""torchvision's ResNets on 32x32 images in [0, 1]."""

from collections.abc import Sequence

from torch import nn

from fastlip.models._architectures import IMAGENET_MEAN, IMAGENET_STD, build_model
from fastlip.models._stems import Stem


def resnet50(
    num_classes: int,
    *,
    stem: Stem = "imagenet",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int | None = None,
) -> nn.Sequential:
    """ResNet-50 (He et al. 2016) with the normalisation inside: ``Sequential(normalize, network)``.

    The same as :func:`build_model` of "torchvision:resnet50", which says what the arguments, the result and the errors
    are. Its head is ``network.fc``.

    Example:
        >>> import fastlip
        >>> model = fastlip.models.resnet50(10, stem="stride-1", seed=0)
    """
    return build_model("torchvision:resnet50", num_classes, stem=stem, mean=mean, std=std, seed=seed)


def resnet18(
    num_classes: int,
    *,
    stem: Stem = "imagenet",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int | None = None,
) -> nn.Sequential:
    """ResNet-18, the small reference, as :func:`resnet50`.

    Example:
        >>> import fastlip
        >>> model = fastlip.models.resnet18(10, stem="cifar", seed=0)
    """
    return build_model("torchvision:resnet18", num_classes, stem=stem, mean=mean, std=std, seed=seed)
