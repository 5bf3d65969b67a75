"""Diagnoses of what makes an evaluation unreliable, in the spirit of AutoAttack's warnings."""

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import check_classes, check_model, check_vector, checked_inputs
from fastlip.attacks._batch import new_batch, take_bound
from fastlip.attacks._model import Model, Network, eval_mode, unwrapped
from fastlip.ops import Bounds

#: How many images are examined.
_IMAGES = 64
#: How many forward passes are compared with the first one.
_REPEATS = 4
#: The difference of logits, relative to their spread, above which they count as random.
_RANDOM = 1e-4
#: How far pixels are moved off the bounds: this share of the box's width, but no further than this value, which exceeds
#: the rounding of bfloat16.
_INSIDE = 1 / 64


class AttackWarning(UserWarning):
    """The result of an evaluation may overestimate the robustness of the model."""


def diagnose(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    bounds: Bounds = (0.0, 1.0),
) -> list[str]:
    """Properties of ``model`` that make gradient attacks unreliable, one sentence each; empty where there are none.

    The first 64 images are examined for outputs that are not finite, outputs that change from call to call, outputs
    that are probabilities instead of logits, outputs that do not depend differentiably on the input, images whose
    cross-entropy has a gradient of exactly zero (saturated or masked), and a clamp of the input to ``bounds``, whose
    gradient PyTorch takes to be zero on the bounds themselves.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.
    """
    check_model(model)
    bounds = checked_inputs(inputs, bounds)
    check_vector(labels, "labels", inputs, torch.int64)
    few = slice(_IMAGES)
    lo, hi = (take_bound(b, few, len(inputs), inputs.dim()) for b in bounds)
    inputs, labels = inputs[few], labels[few]
    network = model if isinstance(model, Network) else Network(unwrapped(model))
    found = []
    with eval_mode(network):
        batch = new_batch(inputs, labels, None, eps=0.0, step_size=0.0, bounds=(lo, hi), ids=None)
        if len(batch) == 0:
            return []
        x = batch.x0.to(inputs.dtype)
        with torch.no_grad():
            logits = network.judge(x)
            check_classes(logits, labels=batch.labels)
            if not bool(logits.isfinite().all()):
                return ["outputs are not finite: attacks count such images as robust"]
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
        (grad,) = torch.autograd.grad(logits, x, ops.judge(logits, batch.labels, loss="ce").grad)
        silent = int((grad.flatten(1).abs().amax(1) == 0).sum()) if grad[0].numel() else 0
        if silent:
            found.append(
                f"the cross-entropy of {silent} of {len(batch)} images has a gradient of exactly zero: it is saturated "
                "or masked; use loss='dlr' or 'margin', and a black-box attack"
            )
        if _clamps(network, x.detach(), grad, batch.labels, (lo, hi)):
            found.append(
                "the model clamps its input: gradients of exactly zero at all pixels on the bounds keep gradient "
                "attacks from changing these; remove the clamp from the model, since attacks keep to bounds themselves"
            )
    return found


def _clamps(
    network: Network,
    x: Tensor,  # [B, ...]
    grad: Tensor,  # [B, ...]
    labels: Tensor,  # [B]
    bounds: Bounds,
) -> bool:
    """Whether exactly the pixels that are moved off the bounds have a gradient.

    Half of the pixels are moved, and then the other half. If the gradient vanished because of another kink or of
    saturation, the pixels that stay on the bounds would get a gradient as well; behind a clamp none of them does.
    """
    lo, hi = (torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in bounds)
    low, high = (x == lo) & (lo < hi), (x == hi) & (lo < hi)
    on = low | high
    if not bool(on.any()) or bool(grad[on].count_nonzero()):
        return False
    step = ((hi - lo) * _INSIDE).clamp(max=_INSIDE)
    inside = torch.where(low, lo + step, torch.where(high, hi - step, x))
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.5
    alive = False
    for moved in (chosen, ~chosen):
        point = torch.where(moved, inside, x).requires_grad_()
        # The margin does not saturate.
        logits = network.judge(point)
        (grad,) = torch.autograd.grad(logits, point, ops.judge(logits, labels, loss="margin").grad)
        if bool(grad[on & ~moved].count_nonzero()):
            return False
        alive |= bool(grad[on & moved].count_nonzero())
    return alive
