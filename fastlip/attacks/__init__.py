"""Attacks: each is one function ``attack(model, inputs, labels, *, ...)`` over the fused operators.

All attacks share this: ``inputs`` are [B, ...] within ``bounds`` (which is checked once), ``labels`` are [B] int64 and
``model`` maps inputs to logits [B, C]. A module is run in eval mode; its modes, gradients and ``requires_grad`` flags
are left as they were. A function is called as it is. Iterates are kept in float32 at least; the images returned have
the dtype of the inputs and are exactly those that the model judged.

An image that is misclassified to begin with comes back unchanged under every setting but ``keep="last"``, which returns
the last iterate of every image. With ``targets`` only the target's decision is a success: an image that is classified
as its target already comes back unchanged, and one that is misclassified as another class is attacked like any other.

A number may be Python's, NumPy's or a tensor without axes. A radius or a step size may also be a tensor [B] with one
for each image, and a bound any tensor that broadcasts to ``inputs`` (:func:`feature_box` makes those of a mask or of a
radius for each feature). Anything else, and any value out of range, is
refused with a TypeError or ValueError that names the argument.
"""

import warnings
from typing import TYPE_CHECKING, Any

from fastlip._precision import Precision
from fastlip.attacks._apgd import apgd
from fastlip.attacks._counts import PassCounts, count_forward_backward
from fastlip.attacks._diagnose import AttackWarning, diagnose
from fastlip.attacks._evaluate import evaluate
from fastlip.attacks._evaluation_result import EvaluationResult
from fastlip.attacks._feature_box import feature_box
from fastlip.attacks._loop import Iteration
from fastlip.attacks._min_norm import MinNormResult, min_norm
from fastlip.attacks._min_sigma import min_sigma
from fastlip.attacks._model import Network
from fastlip.attacks._noise import gaussian_noise
from fastlip.attacks._pgd import fgsm, pgd
from fastlip.attacks._prepare import prepare
from fastlip.attacks._square import square
from fastlip.attacks._suite import Attack, suite
from fastlip.ops import Loss

__all__ = [
    "Attack",
    "AttackWarning",
    "EvaluationResult",
    "Iteration",
    "Loss",
    "MinNormResult",
    "Network",
    "PassCounts",
    "Precision",
    "apgd",
    "count_forward_backward",
    "diagnose",
    "evaluate",
    "feature_box",
    "fgsm",
    "gaussian_noise",
    "min_norm",
    "min_sigma",
    "pgd",
    "prepare",
    "square",
    "suite",
]

#: Former names, each with the one that it has now.
_RENAMED = {"Evaluation": "EvaluationResult", "Passes": "PassCounts", "count_passes": "count_forward_backward"}

if not TYPE_CHECKING:  # a type checker takes a module with __getattr__ to have every name

    def __getattr__(name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"fastlip.attacks.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
