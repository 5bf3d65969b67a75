"""Sound upper bounds on the Lipschitz constant of whole networks.

:func:`lipschitz_bound` traces a model and composes the constants of its parts; :func:`rule` teaches it new modules.
:func:`local_lipschitz` gives the Jacobian's norm at single points, the side that can be seen.
"""

from fastlip.lipschitz import _activations as _activations
from fastlip.lipschitz._bound import LipschitzBound, Part, lipschitz_bound
from fastlip.lipschitz._local import local_lipschitz
from fastlip.lipschitz._registry import Diagonal, rule

__all__ = ["Diagonal", "LipschitzBound", "Part", "lipschitz_bound", "local_lipschitz", "rule"]
