"""Signs that an evaluation may be worth less than it looks, in the spirit of AutoAttack's warnings."""

import torch
from torch import Tensor

from fastlip.attacks._arguments import check_model, check_vector
from fastlip.attacks._batch import check_classes, new_batch, take_bound, within
from fastlip.attacks._losses import attack_loss
from fastlip.attacks._model import Model, Network, attacked, unwrapped
from fastlip.ops import Bounds

#: Images that are looked at.
_IMAGES = 64
#: Forward passes compared with the first.
_REPEATS = 4
#: Differences of logits, relative to their spread, above which they count as random.
_RANDOM = 1e-4


class AttackWarning(UserWarning):
    """An evaluation's result may be worth less than it looks."""


def diagnose(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    bounds: Bounds = (0.0, 1.0),
) -> list[str]:
    """What about ``model`` makes gradient attacks unreliable, one sentence each; empty where nothing was found.

    Looked for on the first 64 images: outputs that are not finite, outputs that change from call to call, outputs that
    are probabilities instead of logits, outputs that do not depend differentiably on the input, and images whose
    cross-entropy has a gradient of exactly zero (saturated or masked).

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.
    """
    check_model(model)
    bounds = within(inputs, bounds)
    check_vector(labels, "labels", inputs, torch.int64)
    few = slice(_IMAGES)
    lo, hi = (take_bound(b, few, len(inputs), inputs.dim()) for b in bounds)
    inputs, labels = inputs[few], labels[few]
    network = model if isinstance(model, Network) else Network(unwrapped(model))
    found = []
    with attacked(network):
        batch = new_batch(inputs, labels, None, eps=0.0, step_size=0.0, bounds=(lo, hi), ids=None)
        if len(batch) == 0:
            return []
        x = batch.x0.to(inputs.dtype)
        with torch.no_grad():
            logits = network.judge(x)
            check_classes(logits, labels=batch.labels)
            if not bool(logits.isfinite().all()):
                return ["outputs are not finite: attacks count such images as standing"]
            spread = (logits.amax(1) - logits.amin(1)).amax().clamp_min(1e-30)
            drift = max(float((network.judge(x) - logits).abs().amax() / spread) for _ in range(_REPEATS))
        if drift > _RANDOM:
            found.append(
                f"outputs change from call to call (by up to {drift:.2g} of their spread): average gradients over "
                "several calls inside the model, and judge over several calls"
            )
        if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
            found.append(
                "outputs are probabilities: attack the logits, because a softmax hides gradients where it saturates"
            )
        x.requires_grad_()
        logits = network.judge(x)
        if not logits.requires_grad:
            found.append("outputs do not depend differentiably on the input: only black-box attacks work")
            return found
        (grad,) = torch.autograd.grad(attack_loss("ce", logits, batch.labels, None).sum(), x)
        silent = int((grad.flatten(1).abs().amax(1) == 0).sum()) if grad[0].numel() else 0
        if silent:
            found.append(
                f"the cross-entropy of {silent} of {len(batch)} images has a gradient of exactly zero: it is saturated "
                "or masked; use loss='dlr' or 'margin', and a black-box attack"
            )
    return found
