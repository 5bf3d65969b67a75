"""Projected gradient descent (Madry et al. 2018) over the fused step, in Linf, L2 and L1."""

import warnings
from typing import Literal

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch, check_classes, new_batch, rows_of, take
from fastlip.attacks._losses import Loss, attack_loss, check_loss, succeeded
from fastlip.attacks._model import Model, attacked, logits_of
from fastlip.ops import Bounds, Norm, PerSample

Keep = Literal["best", "last"]

#: Steps between looks at which images fell. Looking is free on the CPU and a synchronisation on a GPU.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ELSEWHERE = 4


def pgd(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    steps: int = 20,
    step_size: PerSample | None = None,
    loss: Loss = "dlr",
    random_start: bool = True,
    restarts: int = 1,
    keep: Keep = "best",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    start: Tensor | None = None,  # [B, ...]
    active: Tensor | None = None,  # [B] bool
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial images within ``eps`` of ``inputs`` by projected gradient steps; [B, ...] like ``inputs``.

    Each step moves by ``step_size`` along the steepest direction of ``norm`` and projects exactly onto the ball and the
    box (:func:`fastlip.ops.pgd_step_`). With ``keep="best"`` an image is given up as soon as it is misclassified, and
    only those still standing go on; an image that never falls comes back as the iterate of largest loss among the
    steps + 1 of every restart. With ``keep="last"`` every image takes every step and comes back as its last iterate,
    as in torchattacks and foolbox, so also an input that was misclassified to begin with.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball in ``norm`` and the units of ``inputs``, float or [B], >= 0.
        steps: gradient steps of each restart.
        step_size: length of a step in ``norm``, float or [B]; 2.5 eps / steps if None (Madry et al. 2018).
        loss: "dlr" (margin over the spread of the three largest logits, Croce and Hein 2020; the margin below three
            classes and with ``targets``), "margin", or "ce" (cross-entropy, which saturates where logits are large).
        random_start: begin at a uniform point of the ball; else at ``start``.
        restarts: runs in all; an image goes into the next one only while it stands. Needs ``random_start`` above 1.
        keep: "best" or "last".
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        sparsity: share of elements that an "l1" step leaves alone.
        targets: classes to reach, [B] int64; success is then this decision, and no other.
        start: points to begin from when ``random_start`` is False, projected onto ball and box; ``inputs`` if None.
        active: [B] bool; False returns an image unchanged.
        ids: [B] int64 sample ids, from which a sample's random starts are drawn; 0 .. B-1 if None.
        generator: source of random starts, one draw for each restart; the device's default generator if None.

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or the model's output is not differentiable.
        TypeError: a type or dtype is wrong.
    """
    check_loss(loss)
    _check_settings(steps, restarts, keep, random_start, start, inputs)
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)
    with attacked(model) as network:
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=step_size, bounds=bounds, ids=ids)
        run = _Run(network, inputs, norm=norm, steps=steps, loss=loss, keep=keep, sparsity=sparsity)
        standing = batch.take(rows_of(active, inputs))
        if keep == "best" and (random_start or start is not None):
            standing = run.without_fallen(standing)
        for _ in range(restarts):
            if len(standing) == 0:
                break
            if random_start:
                begin = ops.random_start(
                    standing.x0,
                    eps=standing.eps,
                    norm=norm,
                    bounds=standing.bounds,
                    ids=standing.ids,
                    generator=generator,
                )
            elif start is not None:
                begin = take(start.detach().to(standing.x0.dtype), standing.rows)
                begin = ops.project(begin, standing.x0, eps=standing.eps, norm=norm, bounds=standing.bounds)
            else:
                begin = standing.x0.clone()
            standing = run.climb(standing, begin)
    if bool(run.lost_gradients):
        warnings.warn("pgd met gradients that are not finite; those elements counted as 0", stacklevel=2)
    return run.result


def fgsm(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    loss: Loss = "dlr",
    keep: Keep = "best",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
) -> Tensor:
    """One step of length ``eps`` from ``inputs`` (Goodfellow et al. 2015); arguments and errors as in :func:`pgd`."""
    return pgd(
        model,
        inputs,
        labels,
        norm=norm,
        eps=eps,
        steps=1,
        step_size=eps,
        loss=loss,
        random_start=False,
        keep=keep,
        bounds=bounds,
        sparsity=sparsity,
        targets=targets,
        active=active,
    )


def _check_settings(
    steps: int, restarts: int, keep: str, random_start: bool, start: Tensor | None, inputs: Tensor
) -> None:
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    if restarts > 1 and not random_start:
        raise ValueError("restarts above 1 need random_start=True: every run would be the same")
    if start is not None and random_start:
        raise ValueError("start needs random_start=False")
    if start is not None and start.shape != inputs.shape:
        raise ValueError(f"start must have inputs' shape {list(inputs.shape)}, got {list(start.shape)}")
    if keep not in ("best", "last"):
        raise ValueError(f"keep must be 'best' or 'last', got {keep!r}")


class _Run:
    """One call's model, settings and results so far, on the caller's whole batch."""

    def __init__(
        self,
        model: Model,
        inputs: Tensor,  # [B, ...]
        *,
        norm: Norm,
        steps: int,
        loss: Loss,
        keep: Keep,
        sparsity: float,
    ) -> None:
        self.model = model
        self.norm = norm
        self.steps = steps
        self.loss = loss
        self.keep = keep
        self.sparsity = sparsity
        self.result = inputs.detach().clone()
        self.best_loss = torch.full(inputs.shape[:1], -torch.inf, dtype=torch.float64, device=inputs.device)
        self.lost_gradients = torch.zeros((), dtype=torch.bool, device=inputs.device)
        self.classes_checked = False

    def without_fallen(self, batch: Batch) -> Batch:
        """Leave out the images that are misclassified before anything is done to them."""
        if len(batch) == 0:
            return batch
        with torch.no_grad():
            logits = self._logits(batch, batch.x0.to(self.result.dtype))
        return batch.take(_rows(~succeeded(logits, batch.labels, batch.targets)))

    def climb(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...]
    ) -> Batch:
        """Take the steps from ``x``, put what was found into the result and return the images that still stand."""
        best, best_loss = take(self.result, batch.rows), self.best_loss[batch.rows]
        fallen = torch.zeros(len(batch), dtype=torch.bool, device=x.device)
        look = _LOOK_EVERY.get(x.device.type, _LOOK_EVERY_ELSEWHERE)
        for step in range(self.steps + 1):
            final = step == self.steps
            seen = self._seen(batch, x).requires_grad_(not final)
            with torch.set_grad_enabled(not final):
                logits = self._logits(batch, seen)
                losses = attack_loss(self.loss, logits, batch.labels, batch.targets)
            hit = succeeded(logits.detach(), batch.labels, batch.targets)
            if self.keep == "best":
                level = losses.detach().double()
                better = ~fallen & (hit | (level > best_loss))
                best = torch.where(better.reshape(-1, *([1] * (x.dim() - 1))), seen.detach(), best)
                best_loss = torch.where(better, level, best_loss)
                fallen = fallen | hit
            elif final:
                best, fallen = seen.detach(), hit
            looking = self.keep == "best" and step % look == 0
            if final or (looking and bool(fallen.all())):
                break
            self._step(batch, x, seen, losses)
            if looking and bool(fallen.any()):
                self._store(batch, best, best_loss)
                kept = _rows(~fallen)
                batch, x, best, best_loss = batch.take(kept), take(x, kept), take(best, kept), best_loss[kept]
                fallen = fallen[kept]
        self._store(batch, best, best_loss)
        return batch.take(_rows(~fallen))

    def _seen(self, batch: Batch, x: Tensor) -> Tensor:
        """The iterate in the inputs' dtype, still feasible: what the model judges and the caller gets."""
        if x.dtype == self.result.dtype:
            return x.clone()  # the step works in place, and ``best`` may be this iterate
        low = x.to(self.result.dtype)
        return ops.project_(low, batch.x0.to(low.dtype), eps=batch.eps, norm=self.norm, bounds=batch.bounds)

    def _logits(self, batch: Batch, x: Tensor) -> Tensor:
        logits = logits_of(self.model, x)
        if not self.classes_checked:
            check_classes(batch, logits)
            self.classes_checked = True
        return logits

    def _step(self, batch: Batch, x: Tensor, seen: Tensor, losses: Tensor) -> None:
        if not losses.requires_grad:
            raise ValueError("model's output must depend differentiably on its input for a gradient attack")
        # Each loss depends on its own image alone, so one backward pass gives every image's gradient; parameters
        # are not asked for, and theirs are not computed.
        (grad,) = torch.autograd.grad(losses.sum(), seen)
        grad = grad.to(x.dtype)
        if self.norm == "l1":
            # A sparse step moves few elements: spend none of them on those that the box already stops.
            lo, hi = batch.bounds
            grad = torch.where((grad > 0) & (x >= hi) | (grad < 0) & (x <= lo), 0.0, grad)
        self.lost_gradients |= ~grad.sum().isfinite()
        ops.pgd_step_(
            x,
            grad,
            batch.x0,
            step_size=batch.step_size,
            eps=batch.eps,
            norm=self.norm,
            bounds=batch.bounds,
            sparsity=self.sparsity,
        )

    def _store(self, batch: Batch, best: Tensor, best_loss: Tensor) -> None:
        self.result[batch.rows] = best
        self.best_loss[batch.rows] = best_loss


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
