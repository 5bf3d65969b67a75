"""Attacks: each is one function ``attack(model, inputs, labels, *, ...)`` over the fused operators.

Shared by all: ``inputs`` are [B, ...] within ``bounds`` (checked once), ``labels`` are [B] int64 and ``model`` maps
inputs to logits [B, C]. A module is run in eval mode; its mode, gradients and ``requires_grad`` flags are left as they
were. A function is called as it is. Iterates are kept in float32 at least; what is returned has the inputs' dtype and
is exactly what the model was judged on.

An image that is misclassified already comes back unchanged under every setting but ``keep="last"``, which stands for
the last iterate of every image. With ``targets`` success is the target's decision: an image that has it already comes
back unchanged, and one that is misclassified as something else is led to its target like any other.

A number may be Python's, NumPy's or a tensor without axes; a radius or a step size also a tensor [B] of one for each
image, and a bound any tensor that broadcasts to ``inputs``. What is none of these, or out of range, is refused with a
TypeError or ValueError that names the argument.
"""

from fastlip.attacks._apgd import apgd
from fastlip.attacks._checks import AttackWarning, diagnose
from fastlip.attacks._evaluate import Evaluation, evaluate
from fastlip.attacks._losses import Loss
from fastlip.attacks._min_norm import MinNormResult, min_norm
from fastlip.attacks._min_sigma import min_sigma
from fastlip.attacks._model import Network
from fastlip.attacks._noise import gaussian_noise
from fastlip.attacks._passes import Passes, count_passes
from fastlip.attacks._pgd import fgsm, pgd
from fastlip.attacks._prepare import prepare
from fastlip.attacks._square import square
from fastlip.attacks._suite import Attack, suite

__all__ = [
    "Attack",
    "AttackWarning",
    "Evaluation",
    "Loss",
    "MinNormResult",
    "Network",
    "Passes",
    "apgd",
    "count_passes",
    "diagnose",
    "evaluate",
    "fgsm",
    "gaussian_noise",
    "min_norm",
    "min_sigma",
    "pgd",
    "prepare",
    "square",
    "suite",
]
