"""The network architectures of the study."""

from torch import nn

from fastlip.models import resnet18, resnet50


def build(architecture: str, classes: int, stem: str, seed: int) -> nn.Sequential:
    """A network of the study with random initial weights."""
    make = {"resnet50": resnet50, "resnet18": resnet18}[architecture]
    return make(classes, stem="cifar" if stem == "cifar" else "imagenet", seed=seed)
