"""Attacks: each is one function ``attack(model, inputs, labels, *, ...)`` over the fused operators.

Shared by all: ``inputs`` are [B, ...] within ``bounds`` (checked once), ``labels`` are [B] int64 and ``model`` maps
inputs to logits [B, C]. The model is run in eval mode; its mode, gradients and ``requires_grad`` flags are left as they
were. An image that is misclassified already comes back unchanged. Iterates are kept in float32 at least; what is
returned has the inputs' dtype and is exactly what the model was judged on.
"""

from fastlip.attacks._losses import Loss
from fastlip.attacks._min_norm import MinNormResult, min_norm
from fastlip.attacks._min_sigma import min_sigma
from fastlip.attacks._noise import gaussian_noise
from fastlip.attacks._pgd import fgsm, pgd

__all__ = ["Loss", "MinNormResult", "fgsm", "gaussian_noise", "min_norm", "min_sigma", "pgd"]
