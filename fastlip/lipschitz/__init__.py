"""Sound upper bounds on the Lipschitz constant of whole networks.

:func:`lipschitz_bound` traces a model and composes the constants of its parts; :func:`require_rules` looks at once
whether all have one, and :func:`rule` adds rules for new modules and functions. :func:`local_lipschitz` computes the
Jacobian's norm at single points, which is a lower bound.
"""

from fastlip.lipschitz._balls import BallBounds, local_lipschitz_bounds
from fastlip.lipschitz._bound import lipschitz_bound, require_rules
from fastlip.lipschitz._bound_result import LipschitzBound, Part
from fastlip.lipschitz._domain import Domain
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._local import local_lipschitz
from fastlip.lipschitz._registry import Diagonal, FunctionCall, Ranged, rule
from fastlip.lipschitz._rules import load_rules

load_rules()

__all__ = [
    "BallBounds",
    "Diagonal",
    "Domain",
    "FunctionCall",
    "Interval",
    "LipschitzBound",
    "Part",
    "Ranged",
    "lipschitz_bound",
    "local_lipschitz",
    "local_lipschitz_bounds",
    "require_rules",
    "rule",
]
