"""Networks of the study, their inputs in [0, 1], and their weights on disk."""

from fastlip.models._checkpoint import load_checkpoint, save_checkpoint
from fastlip.models._normalize import Normalize
from fastlip.models._resnet import Stem, imagenet_weights, load_backbone, resnet18, resnet50

__all__ = [
    "Normalize",
    "Stem",
    "imagenet_weights",
    "load_backbone",
    "load_checkpoint",
    "resnet18",
    "resnet50",
    "save_checkpoint",
]
