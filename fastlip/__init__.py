"""fastlip: how unstable is this network, and how easily is it fooled?

Everything is imported on first use, so that ``fastlip._native`` (the fused steps on NumPy arrays) stays free of torch.
"""

import importlib
import pkgutil
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

# Python started in a source checkout imports this folder, which holds no compiled part;
# the installed package's folder joins the path, so that `python -m fastlip` there finds it.
__path__ = pkgutil.extend_path(__path__, __name__)

try:
    __version__ = _version("fastlip")
except PackageNotFoundError:
    # A source checkout: neither the compiled parts nor the version are there.
    raise ImportError("fastlip is not installed: run `pip install .` in its source folder") from None

if TYPE_CHECKING:
    from fastlip import attacks, data, integrations, lipschitz, metrics, models, norms, ops, study
    from fastlip._info import build_info
    from fastlip.lipschitz import LipschitzBound, lipschitz_bound, local_lipschitz, local_lipschitz_bounds
    from fastlip.norms import NormInterval, NormOptions, NormReport, conv_norm, layer_norms

_EXPORTS = {
    "build_info": "fastlip._info",
    "conv_norm": "fastlip.norms",
    "layer_norms": "fastlip.norms",
    "NormInterval": "fastlip.norms",
    "NormOptions": "fastlip.norms",
    "NormReport": "fastlip.norms",
    "lipschitz_bound": "fastlip.lipschitz",
    "local_lipschitz": "fastlip.lipschitz",
    "local_lipschitz_bounds": "fastlip.lipschitz",
    "LipschitzBound": "fastlip.lipschitz",
}
_MODULES = ("attacks", "data", "integrations", "lipschitz", "metrics", "models", "norms", "ops", "study")

__all__ = [
    "LipschitzBound",
    "NormInterval",
    "NormOptions",
    "NormReport",
    "__version__",
    "attacks",
    "build_info",
    "conv_norm",
    "data",
    "integrations",
    "layer_norms",
    "lipschitz",
    "lipschitz_bound",
    "local_lipschitz",
    "local_lipschitz_bounds",
    "metrics",
    "models",
    "norms",
    "ops",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastlip.{name}")
    else:
        raise AttributeError(f"module 'fastlip' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
