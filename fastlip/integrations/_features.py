"""Masks and radii of features as options of adapters, which attacks take as bounds."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastlip.attacks import feature_box

#: The options, by the names that :func:`fastlip.attacks.feature_box` has for them.
FEATURES = ("mask", "radius")


def with_box(
    options: Mapping[str, Any],
    inputs: Tensor,  # [B, ...]
) -> dict[str, Any]:
    """``options`` with the ``bounds`` that their ``mask`` and ``radius`` leave to the features of ``inputs``."""
    out = {name: value for name, value in options.items() if name not in FEATURES}
    mask, radius = (options.get(name) for name in FEATURES)
    if mask is not None or radius is not None:
        radius = math.inf if radius is None else radius
        out["bounds"] = feature_box(inputs, radius=radius, mask=mask, bounds=options.get("bounds", (0.0, 1.0)))
    return out
