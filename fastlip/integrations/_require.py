"""Imports of the packages that adapters need."""

import importlib
from typing import Any


def require(module: str, package: str) -> Any:
    """Import ``module``.

    Raises:
        ImportError: the module is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"fastlip.integrations needs {module}: pip install {package} (or fastlip[integrations])"
        ) from None
