"""The network architectures of the study."""

from collections import OrderedDict

import torch
from torch import nn

from fastlip.models import Normalize, resnet18, resnet50

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(architecture: str, classes: int, stem: str, seed: int) -> nn.Sequential:
    """A network of the study with random initial weights."""
    kind, _, name = architecture.partition(":")
    if kind == "torchvision":
        make = {"resnet50": resnet50, "resnet18": resnet18}[name]
        return make(classes, stem="cifar" if stem == "cifar" else "imagenet", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _small(name, classes)
    return nn.Sequential(OrderedDict(normalize=Normalize(_MEAN, _STD), network=network))


def _small(name: str, classes: int) -> nn.Sequential:
    """A small reference for images of 3x32x32, its head named "fc"."""
    if name == "softmax":
        parts: list[nn.Module] = [nn.Flatten()]
        width = 3072
    elif name == "mlp":
        parts = [nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        width = 512
    else:
        parts, width = [], 3
        for channels in (32, 64, 128):
            parts += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            width = channels
        parts += [nn.Flatten(), nn.Linear(2048, 256), nn.ReLU()]
        width = 256
    named = {str(i): part for i, part in enumerate(parts)}
    return nn.Sequential(OrderedDict(named | {"fc": nn.Linear(width, classes)}))
