"""Networks by name, their parts, their inputs in [0, 1], and their weights on disk."""

from fastlip.models._anatomy import Anatomy, anatomy, short_name
from fastlip.models._architectures import SCALES, build_model
from fastlip.models._checkpoint import load_checkpoint, save_checkpoint
from fastlip.models._live_taps import dead_share, live_taps
from fastlip.models._normalize import Normalize
from fastlip.models._references import REFERENCES
from fastlip.models._resnet import resnet18, resnet50
from fastlip.models._stems import STEMS, Stem
from fastlip.models._torch_modules import stored_name
from fastlip.models._weights import imagenet_weights, load_backbone, published_weights

__all__ = [
    "REFERENCES",
    "SCALES",
    "STEMS",
    "Anatomy",
    "Normalize",
    "Stem",
    "anatomy",
    "build_model",
    "dead_share",
    "imagenet_weights",
    "live_taps",
    "load_backbone",
    "load_checkpoint",
    "published_weights",
    "resnet18",
    "resnet50",
    "save_checkpoint",
    "short_name",
    "stored_name",
]
