"""The optional dependency of this package."""

from typing import Any


def torchvision_datasets() -> Any:
    """Return torchvision.datasets, or say what to install."""
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError('reading images needs torchvision: pip install "fastlip[study]"') from None
    return datasets
