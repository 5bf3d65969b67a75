"""The optional dependencies of this package."""

from typing import Any


def torchvision_datasets() -> Any:
    """Return torchvision.datasets, or say what to install."""
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError('reading images needs torchvision: pip install "fastlip[study]"') from None
    return datasets


def hugging_face_datasets() -> Any:
    """Return the library datasets, or say what to install; versions before 4 are refused, which execute code."""
    try:
        import datasets
    except ImportError:
        raise ImportError('data sets of Hugging Face need the library datasets: pip install "fastlip[hub]"') from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ImportError(f'datasets {datasets.__version__} executes the code of data sets: pip install "fastlip[hub]"')
    return datasets
