"""The optional dependencies of this package."""

from typing import Any


def torchvision_models() -> Any:
    """Return torchvision.models, or say what to install."""
    try:
        from torchvision import models
    except ImportError:
        raise ImportError('torchvision models need torchvision: pip install "fastlip[study]"') from None
    return models


def safetensors() -> Any:
    """Return the package safetensors, or say what to install."""
    try:
        import safetensors.torch as found
    except ImportError:
        raise ImportError('checkpoints need safetensors: pip install "fastlip[study]"') from None
    return found


def timm() -> Any:
    """Return the package timm, or say what to install."""
    try:
        import timm as found
    except ImportError:
        raise ImportError('timm models need timm: pip install "fastlip[timm]"') from None
    return found
