"""Figures of results, by matplotlib, which is imported for them alone."""

import importlib
from typing import Any


def axes_or_new(axes: Any, size: tuple[float, float]) -> Any:
    """``axes``, or those of a new figure of ``size`` inches if None.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise ImportError('figures need matplotlib: pip install "fastlip[study]"') from None
    return pyplot.subplots(figsize=size, layout="constrained")[1]
