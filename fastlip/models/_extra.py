"""The optional dependencies of this package."""

from typing import Any


def torchvision_models() -> Any:
    """Return torchvision.models, or say what to install."""
    try:
        from torchvision import models
    except ImportError:
        raise ImportError('the ResNets need torchvision: pip install "fastlip[study]"') from None
    return models


def safetensors() -> Any:
    """Return the package safetensors, or say what to install."""
    try:
        import safetensors.torch as found
    except ImportError:
        raise ImportError('checkpoints need safetensors: pip install "fastlip[study]"') from None
    return found
