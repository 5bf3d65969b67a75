"""Rules: a file for each family, whose rules and builders register themselves when it is imported."""

from importlib import import_module
from pkgutil import iter_modules


def load_rules() -> None:
    """Import all files of this package."""
    for found in iter_modules(__path__):
        import_module(f"{__name__}.{found.name}")
