"""Diagnoses of what makes an evaluation unreliable, in the spirit of AutoAttack's warnings."""

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import check_classes, check_model, checked_inputs, checked_integers
from fastlip.attacks._batch import new_batch, take_bound
from fastlip.attacks._model import Model, Network, NotDifferentiable, eval_mode, input_gradient, unwrapped
from fastlip.ops import Bounds

#: How many images are examined.
_IMAGES = 64
#: How many forward passes are compared with the first one.
_REPEATS = 4
#: The difference of logits, relative to their spread, above which they count as random.
_RANDOM = 1e-4
#: The difference between the logits of an image alone and in a batch, relative to their spread, that rounding may make.
_BATCH = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
#: How far pixels are moved off the bounds: this share of the box's width, but no further than this value, which exceeds
#: the rounding of bfloat16.
_INSIDE = 1 / 64


class AttackWarning(UserWarning):
    """The result of an evaluation may overestimate the robustness of the model, or say little of it."""


def diagnose(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    bounds: Bounds = (0.0, 1.0),
) -> list[str]:
    """Properties of ``model`` that make gradient attacks unreliable, one sentence each; empty where there are none.

    The first 64 images are examined for outputs that are not finite (but for -inf, the logit of a class that the model
    excludes), outputs that change from call to call or with the other images of the batch, outputs that are
    probabilities instead of logits, outputs that do not depend differentiably on the input, images whose cross-entropy
    has a gradient of exactly zero (saturated or masked), and a clamp of the input to ``bounds``, whose gradient PyTorch
    takes to be zero on the bounds themselves.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> for sentence in attacks.diagnose(model, images, labels):
        ...     print(sentence)
    """
    check_model(model)
    inputs, bounds = checked_inputs(inputs, bounds)
    labels = checked_integers(labels, "labels", inputs)
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
            excluded = logits == -torch.inf
            if bool((~logits.isfinite() & ~excluded).any()) or bool(excluded.all(1).any()):
                return ["outputs are not finite: attacks count such images as robust"]
            spread = (logits.amax(1) - logits.masked_fill(excluded, torch.inf).amin(1)).amax().clamp_min(1e-30)

            def change(other: Tensor, rows: slice) -> float:
                apart = torch.where((other == -torch.inf) & excluded[rows], 0.0, (other - logits[rows]).abs())
                return float(apart.amax() / spread)

            drift = max(change(network.judge(x), slice(None)) for _ in range(_REPEATS))
            alone = change(network.judge(x[:1]), slice(1)) if len(batch) > 1 else 0.0
        if drift > _RANDOM:
            found.append(
                f"outputs change from call to call (by up to {drift:.2g} of their spread): judge over several calls "
                "(draws) and differentiate the mean of several (eot)"
            )
        elif alone > _BATCH[x.dtype]:
            found.append(
                f"outputs depend on the other images of the batch (by up to {alone:.2g} of their spread): an image "
                "that falls in one batch may stand in another, so that no accuracy holds beyond this batch size"
            )
        if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
            found.append(
                "outputs are probabilities: attack the logits, because a softmax hides gradients where it saturates"
            )
        x.requires_grad_()
        logits = network.judge(x)
        try:
            grad = input_gradient(logits, x, ops.judge(logits, batch.labels, loss="ce").grad)
        except NotDifferentiable:
            found.append("outputs do not depend differentiably on the input: only black-box attacks work")
            return found
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
        grad = input_gradient(logits, point, ops.judge(logits, labels, loss="margin").grad)
        if bool(grad[on & ~moved].count_nonzero()):
            return False
        alive |= bool(grad[on & moved].count_nonzero())
    return alive
